"""`scalselect run` and `scalselect demo`."""

import logging
from pathlib import Path
from typing import Annotated, get_args

import dagster as dg
import typer
from rich.markup import escape

from scalselect_assets import deployment
from scalselect_assets.cli.options import (
    CHOICE_PANEL,
    PAPER_MODEL,
    Device,
    DeviceOption,
    Dtype,
    JsonOption,
    StoreOption,
    VerboseOption,
    absolute_place,
    declared_from_options,
    evaluation_options,
    export_options,
    near_duplicates_option,
    quota_options,
    rank_option,
    text_only_option,
    wanted_budget,
)
from scalselect_assets.cli.printing import (
    ERR,
    OUT,
    PLAIN,
    ProgressBars,
    print_json,
    print_summary,
    print_work,
    user_errors,
)
from scalselect_assets.declaration.choice_settings import StrategyName
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.operations.refresh import Refresh
from scalselect_assets.operations.summary import summary
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource


def run(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder (or file) of the pool's shard files.")
    ],
    image_root: Annotated[
        str | None, typer.Option(help="What image paths are relative to. (default: each shard's folder)")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help=f"The VLM to be tuned: local folder or hub id. (default: {PAPER_MODEL})"),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of weights and activations. (default: float32)")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Fraction (0.16, 16%) or number of samples. (default: 0.16)")
    ] = None,
    attention_mass: Annotated[
        float | None, typer.Option(help="Attention share of the kept vision tokens. (default: 0.9)")
    ] = None,
    energy: Annotated[float | None, typer.Option(help="Energy share of the subspace. (default: 0.9)")] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            help="How many directions: energy, gavish_donoho, effective_rank or a number. (default: energy)"
        ),
    ] = None,
    standardise: Annotated[
        bool | None,
        typer.Option(
            "--standardise/--no-standardise",
            help="Divide columns by their standard deviation? (default: no)",
            show_default=False,
        ),
    ] = None,
    unit_rows: Annotated[
        bool | None,
        typer.Option(
            "--unit-rows/--no-unit-rows",
            help="Scale embeddings to length 1? (default: no)",
            show_default=False,
        ),
    ] = None,
    rebuild_basis: Annotated[
        bool, typer.Option("--rebuild-basis", help="Add up the moments of all shards anew.")
    ] = False,
    text_only: Annotated[
        str | None,
        typer.Option(
            help="Rows without an image: drop, keep, or how many (a share or a number). (default: drop)"
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help=f"What is preferred: {', '.join(get_args(StrategyName))}. (default: top_leverage)",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of what is drawn. (default: 0)", rich_help_panel=CHOICE_PANEL)
    ] = None,
    image_tokens: Annotated[
        str | None,
        typer.Option(help="A budget of vision tokens, instead of rows.", rich_help_panel=CHOICE_PANEL),
    ] = None,
    text_tokens: Annotated[
        str | None,
        typer.Option(help="A budget of all other tokens, instead of rows.", rich_help_panel=CHOICE_PANEL),
    ] = None,
    source_label: Annotated[
        str | None,
        typer.Option(
            help="What names a row's source: source (its field), shard, shard_folder, image_folder or "
            "field:NAME. (default: source)",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(
            help="SOURCE=ROWS or SOURCE=SHARE of the budget that is chosen at least.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None,
    ceiling: Annotated[
        list[str] | None,
        typer.Option(help="The same, that is chosen at most.", rich_help_panel=CHOICE_PANEL),
    ] = None,
    include: Annotated[
        str | None,
        typer.Option(
            help="File of samples that must be chosen: an id, a key or an image's SHA-256 a line.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None,
    exclude: Annotated[
        str | None,
        typer.Option(help="The same, of samples that must not.", rich_help_panel=CHOICE_PANEL),
    ] = None,
    near_duplicates: Annotated[
        str | None,
        typer.Option(
            metavar="COSINE",
            help="Remove samples with like text within this cosine of one of higher leverage; `suggested` "
            "takes the cosine from the pool.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None,
    contentless_pictures: Annotated[
        str | None,
        typer.Option(
            metavar="keep|remove",
            help="Remove samples whose pictures are one colour or noise? (default: keep)",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None,
    evaluation_images: Annotated[
        str | None,
        typer.Option(help="Remove samples whose image is in this folder.", rich_help_panel=CHOICE_PANEL),
    ] = None,
    evaluation_texts: Annotated[
        str | None,
        typer.Option(help="Remove samples that hold a text of this file.", rich_help_panel=CHOICE_PANEL),
    ] = None,
    export: Annotated[
        list[str] | None,
        typer.Option(
            help="Also write for a trainer: FORMAT or FORMAT:order=score,images=copied; see docs/exports.md.",
            rich_help_panel=CHOICE_PANEL,
        ),
    ] = None,
    store: StoreOption = None,
    name: Annotated[
        str | None, typer.Option(help="Prefix of the asset keys. (default: from the source's name)")
    ] = None,
    device: DeviceOption = Device.AUTO,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens computed together. (default: 4096, on a GPU 32768)"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that decode ahead. (default: a thread, on a GPU most cores)"),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Bring the selection from SOURCE up to date: embed what is new or changed, rescore, select.

    Options that are left out keep what the store's selection.yaml says from the last run.
    """
    with user_errors(verbose=verbose):
        options = {
            "image_root": image_root and absolute_place(image_root),
            "target_model": model,
            "model_revision": revision,
            "dtype": dtype and dtype.value,
            "attention_mass": attention_mass,
            "energy": energy,
            "rank": rank_option(rank),
            "standardise": standardise,
            "unit_rows": unit_rows,
            "text_only": text_only_option(text_only),
            "strategy": strategy,
            "seed": seed,
            "source_label": source_label,
            "include": include and absolute_place(include),
            "exclude": exclude and absolute_place(exclude),
            "contentless_pictures": contentless_pictures,
            **near_duplicates_option(near_duplicates),
            **wanted_budget(budget, image_tokens, text_tokens),
            **quota_options(floor or [], ceiling or []),
            **evaluation_options(evaluation_images, evaluation_texts),
            **export_options(export),
        }
        with declared_from_options(source, store, name, options) as selection:
            refresh_and_report(
                selection,
                VlmResource(device=device.value, batch_tokens=batch_tokens, workers=workers),
                as_json=as_json,
                verbose=verbose,
                rebuild_basis=rebuild_basis,
            )


def demo(
    folder: Annotated[Path, typer.Option(help="Where pool, model and store are made.")] = Path(".scalselect"),
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
            OUT.print(
                "\nThe demo model's weights are random, so the path is real and the choice means nothing; "
                "name a real model with [bold]scalselect run --model[/bold].\n"
                "Look at the runs and the lineage: [bold]make dev[/bold] or "
                f"[bold]scalselect ui --store {folder / 'demo'}[/bold]"
            )


# Running and telling


def refresh_and_report(
    selection: Selection,
    vlm: VlmResource,
    *,
    as_json: bool,
    verbose: bool,
    rebuild_basis: bool = False,
) -> None:
    """Refresh, print the summary, and exit with 1 if a shard failed."""
    with deployment.open_instance(selection) as instance, ProgressBars() as bars:
        report = make_refresh(
            selection, instance, vlm, bars, verbose=verbose, rebuild_basis=rebuild_basis
        ).run()
    result = {
        **summary(StorageResource().artifacts(selection.store)),
        "shards_embedded": report.embedded,
        "samples_computed": report.computed_rows,
        "samples_reused": report.reused_rows,
        "being_written": report.unsettled,
        "failed": report.failed,
        "failed_checks": report.failed_checks,
    }
    if as_json:
        print_json(result)
    else:
        print_summary(selection, result)
        print_work(report)
    for problem in (problems := report.problems()):
        ERR.print(f"[red]{escape(problem)}[/red]", **PLAIN)
    if problems:
        raise typer.Exit(1)


def make_refresh(
    selection: Selection,
    instance: dg.DagsterInstance,
    vlm: VlmResource,
    bars: "ProgressBars",
    *,
    verbose: bool,
    rebuild_basis: bool = False,
) -> Refresh:
    """A refresh of one selection, with the given resources in its asset job."""
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
    )
