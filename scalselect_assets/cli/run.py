"""`scalselect run` and `scalselect demo`."""

import logging
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
import typer

from scalselect_assets import deployment
from scalselect_assets.cli.option_groups import grouped_options
from scalselect_assets.cli.options import JsonOption, VerboseOption, declared_from_options
from scalselect_assets.cli.printing import (
    ProgressBars,
    complain,
    print_json,
    print_summary,
    print_work,
    say,
    user_errors,
)
from scalselect_assets.cli.run_options import (
    ChoiceOptions,
    ComputingOptions,
    ImageOptions,
    ModelOptions,
    PoolOptions,
    RemovalOptions,
    StoreOptions,
    SubspaceOptions,
)
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.operations.deep_verification import deep_problems
from scalselect_assets.operations.refresh import Refresh
from scalselect_assets.operations.summary import summary
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource


@grouped_options
def run(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder (or file) of the pool's shard files.")
    ],
    pool: PoolOptions,
    model: ModelOptions,
    images: ImageOptions,
    subspace: SubspaceOptions,
    choice: ChoiceOptions,
    removal: RemovalOptions,
    place: StoreOptions,
    computing: ComputingOptions,
    *,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Bring the selection from SOURCE up to date: embed what is new or changed, rescore, select.

    Options that you leave out keep what the store's selection.yaml says from the last run.
    """
    with user_errors(verbose=verbose):
        settings: dict[str, Any] = {}
        for group in (pool, model, images, subspace, choice, removal):
            settings |= group.settings()
        with declared_from_options(source, place.store, place.name, settings) as selection:
            refresh_and_report(
                selection,
                computing.vlm(),
                as_json=as_json,
                verbose=verbose,
                rebuild_basis=subspace.rebuild_basis,
                repair=place.repair,
                accept_missing_images=pool.accept_missing_images,
            )


def demo(
    folder: Annotated[Path, typer.Option(help="Folder for pool, model and store.")] = Path(".scalselect"),
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Generate a sample pool and a small random VLM, and run the whole path on them."""
    with user_errors(verbose=verbose):
        from scalselect_assets.demo.demo_model import write_demo_vlm
        from scalselect_assets.demo.demo_pool import write_demo_pool

        pool = write_demo_pool(folder / "demo-pool")
        vlm = write_demo_vlm(folder / "demo-vlm")
        options = {"target_model": str(vlm), "budget": 0.16}
        with declared_from_options(str(pool.root), str(folder / "demo"), "demo", options) as selection:
            refresh_and_report(selection, VlmResource(device="cpu"), as_json=as_json, verbose=verbose)
        if not as_json:
            say(
                "\nThe demo model's weights are random, so the path is real and the choice means nothing; "
                "name a real model with scalselect run --model.\n"
                "Look at the runs and the lineage: make dev or "
                f"scalselect ui --store {folder / 'demo'}"
            )


# Running and reporting


def refresh_and_report(
    selection: Selection,
    vlm: VlmResource,
    *,
    as_json: bool,
    verbose: bool,
    rebuild_basis: bool = False,
    repair: bool = False,
    accept_missing_images: bool = False,
) -> None:
    """Refresh and print the summary; exit with 1 if a shard or a check failed."""
    if repair:
        _remove_what_is_wrong(selection)
    with deployment.opened_instance(selection) as instance, ProgressBars() as bars:
        report = make_refresh(
            selection,
            instance,
            vlm,
            bars,
            verbose=verbose,
            rebuild_basis=rebuild_basis,
            accept_missing_images=accept_missing_images,
        ).run()
    result = {
        **summary(StorageResource().artifacts(selection.store)),
        "shards_embedded": report.embedded,
        "samples_computed": report.computed_rows,
        "samples_reused": report.reused_rows,
        "being_written": report.unsettled,
        "passed_over": report.passed_over,
        "rows_without_image": report.kept_rows,
        "damaged": report.damaged,
        "failed": report.failed,
        "failed_checks": report.failed_checks,
    }
    if as_json:
        print_json(result)
    else:
        print_summary(selection, result)
        print_work(report)
    if kept := sum(report.kept_rows.values()):
        complain(
            f"{kept:,} rows keep their vectors though their images are missing; where these are gone for "
            "good, run with --accept-missing-images",
            label="missing:",
        )
    for message in report.damaged.values():
        complain(f"{message}: it was made again", label="damaged:")
    for problem in (problems := report.problems()):
        complain(problem)
    if problems:
        raise typer.Exit(1)


def _remove_what_is_wrong(selection: Selection) -> None:
    """Remove what `verify --deep` finds, so that the refresh makes it again."""
    storage = StorageResource()
    with storage.locks(selection.store).alone():
        for problem in deep_problems(selection, storage):
            for path in problem.remove:
                path.unlink(missing_ok=True)
            complain(f"{problem.message}: it is made again", label="repair:")


def make_refresh(
    selection: Selection,
    instance: dg.DagsterInstance,
    vlm: VlmResource,
    bars: "ProgressBars",
    *,
    verbose: bool,
    rebuild_basis: bool = False,
    accept_missing_images: bool = False,
) -> Refresh:
    """A refresh of one selection whose asset job uses the given resources."""
    storage = StorageResource()
    overrides = {"storage": storage, "vlm": vlm, "progress": bars}
    defs = deployment.build_defs([selection], overrides)
    log = logging.getLogger("scalselect")
    return Refresh(
        selection,
        job=defs.resolve_job_def(selection.job_name("assets")),
        instance=instance,
        storage=storage,
        vlm=vlm,
        progress=bars,
        log=log,
        log_level="INFO" if verbose else "CRITICAL",
        rebuild_basis=rebuild_basis,
        accept_missing_images=accept_missing_images,
    )
