"""`scalselect status`, `explain` and `verify`: they read a store and change nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from scalselect_assets import deployment
from scalselect_assets.cli.options import Device, DeviceOption, JsonOption, VerboseOption, declaration_path
from scalselect_assets.cli.printing import (
    complain,
    print_json,
    print_summary,
    say,
    user_errors,
)
from scalselect_assets.dataset.training_manifest import is_complete
from scalselect_assets.declaration.selection_file import read_selection
from scalselect_assets.explain.explanation import DEFAULT_SIMILAR
from scalselect_assets.explain.sample_attention import SampleAttention, attention_of
from scalselect_assets.explain.sample_lineage import SampleLineage, trace
from scalselect_assets.explain.why import explain as explain_sample
from scalselect_assets.operations.deep_verification import deep_problems
from scalselect_assets.operations.staleness import Staleness
from scalselect_assets.operations.summary import summary
from scalselect_assets.pool.discovery import discover
from scalselect_assets.recording.records import Records
from scalselect_assets.resources.pool_listing import in_words
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource
from scalselect_assets.subspace.sample_directions import DEFAULT_DIRECTIONS
from scalselect_assets.subspace.verification import REBUILD_TOLERANCE, rebuild_difference


def status(
    store: Annotated[str, typer.Option(help="The store to look at.")],
    sample: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Follow one sample back to its file, its model and the runs that made it. KEY is its sample "
            "key or the first 6 or more characters of that, its id, or SHARD#ROW.",
        ),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show what a store holds and what the next run would compute; changes no result."""
    with user_errors(verbose=verbose):
        selection = read_selection(declaration_path(store))
        storage = StorageResource()
        if sample is not None:
            with deployment.opened_instance(selection, to_read=True) as instance:
                print_lineage(trace(selection, storage, instance, sample), as_json=as_json)
            return
        artifacts = storage.artifacts(selection.store)
        discovery = discover(
            selection.open_pool(storage),
            artifacts,
            selection.settle_seconds,
            remember=deployment.is_writable_store(selection),
        )
        with deployment.opened_instance(selection, to_read=True) as instance:
            staleness = Staleness(selection, storage, VlmResource(), instance)
            pending, problems = staleness.pending(discovery), staleness.problems()
            problems += [f"damaged: {message}" for message in staleness.verified.damaged.values()]
            known = set(Records(instance).known_shards(selection.name))
        result = summary(artifacts) if is_complete(artifacts) else {}
        state = {
            **result,
            "shards": len(discovery.versions),
            "pending": pending,
            "being_written": list(discovery.unsettled),
            "passed_over": dict(discovery.passed_over),
            "shards_removed": sorted(known - set(discovery.versions)),
            "problems": problems,
        }
        if as_json:
            print_json(state)
        else:
            if result:
                print_summary(selection, state)
            else:
                say("There is no result yet.")
                if there := in_words(discovery.passed_over):
                    say(f"Not read: {there}.")
            if pending:
                say(f"Out of date: {', '.join(pending[:20])}; `scalselect run` brings it up to date.")
            else:
                say(f"All {len(discovery.versions)} shards and what follows from them are up to date.")
        _end_with(problems)


def _end_with(problems: Sequence[str]) -> None:
    """Print problems, and exit with 1 if there are any."""
    for problem in problems:
        complain(problem)
    if problems:
        raise typer.Exit(1)


def explain(
    sample: Annotated[
        str,
        typer.Argument(
            metavar="SAMPLE",
            help="Its sample key or the first 6 or more characters of that, its id, or SHARD#ROW.",
        ),
    ],
    store: Annotated[str, typer.Option(help="The store to look at.")],
    similar: Annotated[
        int, typer.Option(min=0, help="How many of the most similar samples to show.")
    ] = DEFAULT_SIMILAR,
    directions: Annotated[
        int, typer.Option(min=1, help="How many of the directions of its leverage to show.")
    ] = DEFAULT_DIRECTIONS,
    attention: Annotated[
        bool, typer.Option("--attention", help="Load the model and show what it looked at.")
    ] = False,
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Load the model and draw what it looked at; further images of the sample get -2, -3, ...",
        ),
    ] = None,
    max_side: Annotated[int, typer.Option(min=32, help="Longest side of a drawing, in pixels.")] = 768,
    device: DeviceOption = Device.AUTO,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show why a sample was selected, or not: its leverage, rank, directions and the most similar samples."""
    with user_errors(verbose=verbose):
        selection = read_selection(declaration_path(store))
        storage = StorageResource()
        with deployment.opened_instance(selection, to_read=True) as instance:
            shards = Records(instance).known_shards(selection.name)
            problems = Staleness(selection, storage, VlmResource(), instance).problems()
        explanation = explain_sample(
            selection, storage, sample, similar=similar, directions=directions, shards=shards
        )
        seen = None
        if attention or image is not None:
            seen = attention_of(selection, storage, VlmResource(device=device.value), explanation.sample)
        drawings = _draw(seen, image, max_side) if seen is not None and image is not None else []
        if as_json:
            extra = {} if seen is None else {"attention_map": seen.to_json()}
            print_json({**explanation.to_json(), **extra, "drawings": list(map(str, drawings))})
        else:
            lines = [
                *explanation.lines(),
                *(seen.lines() if seen else ()),
                *(("drawn in", str(f)) for f in drawings),
            ]
            for label, value in lines:
                say(f"{label:<24}{value}".rstrip())
        _end_with([*(f"inconsistent: {problem}" for problem in explanation.problems), *problems])


def verify(
    store: Annotated[str, typer.Option(help="The store to look at.")],
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Read everything, and compare the scores with those of all vectors."),
    ] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compute the basis anew from the moments of all shards and compare; changes nothing."""
    with user_errors(verbose=verbose):
        selection = read_selection(declaration_path(store))
        storage = StorageResource()
        run = f"scalselect run {selection.source} --store {store}"
        found = [problem.message for problem in deep_problems(selection, storage)] if deep else []
        with deployment.opened_instance(selection, to_read=True) as instance:
            failed = Staleness(selection, storage, VlmResource(), instance).problems()
        if found:
            # A damaged file is named already; a comparison with it would repeat the fault in other words.
            if as_json:
                print_json({"problems": [*found, *failed], "equal": False})
            _end_with([*found, *failed, f"made anew by: {run} --repair"])
        difference = rebuild_difference(storage.artifacts(selection.store))
        equal = max(difference.values()) <= REBUILD_TOLERANCE
        if as_json:
            print_json({**difference, "equal": equal, "problems": failed})
        else:
            for name, value in difference.items():
                say(f"{name:<24}{value:.2e}")
            relation = "equals" if equal else "differs from"
            say(f"The basis {relation} its rebuild (tolerance {REBUILD_TOLERANCE:g}).")
            if deep:
                say(
                    "Every file and table is what was written, and scores and choice follow from the vectors."
                )
        _end_with([*([] if equal else [f"made anew by: {run} --rebuild-basis"]), *failed])


def print_lineage(lineage: SampleLineage, *, as_json: bool) -> None:
    """Print a sample's lineage; steps that do not fit each other give exit code 1."""
    if as_json:
        print_json(lineage.to_json())
    else:
        for label, value in lineage.lines():
            say(f"{label:<30}{value}".rstrip())
    _end_with([f"inconsistent: {problem}" for problem in lineage.problems])


def _draw(seen: SampleAttention, file: Path, max_side: int) -> list[Path]:
    """Write a drawing for each image; the first gets the name ``file``, the others a number."""
    files = []
    for number, png in enumerate(seen.pngs(max_side), start=1):
        files.append(file if number == 1 else file.with_stem(f"{file.stem}-{number}"))
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        files[-1].write_bytes(png)
    return files
