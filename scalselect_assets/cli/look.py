"""`scalselect status`, `explain` and `verify`: they read a store and change nothing."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from scalselect_assets import deployment
from scalselect_assets.cli.options import Device, DeviceOption, JsonOption, VerboseOption, declaration_path
from scalselect_assets.cli.printing import (
    ERR,
    OUT,
    PLAIN,
    print_json,
    print_summary,
    user_errors,
)
from scalselect_assets.dataset.training_manifest import is_complete
from scalselect_assets.declaration.selection import read_selection
from scalselect_assets.explain.explanation import DEFAULT_SIMILAR
from scalselect_assets.explain.sample_attention import SampleAttention, attention_of
from scalselect_assets.explain.sample_lineage import SampleLineage, trace
from scalselect_assets.explain.why import explain as explain_sample
from scalselect_assets.operations.staleness import Staleness
from scalselect_assets.operations.summary import summary
from scalselect_assets.pool.discovery import discover
from scalselect_assets.recording.partitions import known_shards
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
            help="Follow one sample back to its file, its model and the runs that made it: by its key, the "
            "first 6 or more characters of it, its id, or SHARD#ROW.",
        ),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Say what a store holds and what the next run would compute; changes no result."""
    with user_errors(verbose=verbose):
        selection = read_selection(declaration_path(store))
        storage = StorageResource()
        if sample is not None:
            with deployment.open_instance(selection) as instance:
                print_lineage(trace(selection, storage, instance, sample), as_json=as_json)
            return
        artifacts = storage.artifacts(selection.store)
        discovery = discover(
            storage.samples(selection.source, selection.image_root, selection.store),
            artifacts,
            selection.settle_seconds,
        )
        with deployment.open_instance(selection) as instance:
            pending = Staleness(selection, storage, VlmResource(), instance).pending(discovery)
            known = set(known_shards(instance, selection.name))
        result = summary(artifacts) if is_complete(artifacts) else {}
        state = {
            **result,
            "shards": len(discovery.versions),
            "pending": pending,
            "being_written": list(discovery.unsettled),
            "shards_removed": sorted(known - set(discovery.versions)),
        }
        if as_json:
            print_json(state)
            return
        if result:
            print_summary(selection, result)
        else:
            OUT.print("There is no result yet.")
        if pending:
            OUT.print(f"Out of date: {', '.join(pending[:20])}; `scalselect run` brings it up to date.")
        else:
            OUT.print(f"All {len(discovery.versions)} shards and what follows from them are up to date.")


def explain(
    sample: Annotated[
        str,
        typer.Argument(
            metavar="SAMPLE",
            help="Its key, the first 6 or more characters of it, its id, or SHARD#ROW.",
        ),
    ],
    store: Annotated[str, typer.Option(help="The store to look at.")],
    similar: Annotated[
        int, typer.Option(min=0, help="How many of the samples most like it.")
    ] = DEFAULT_SIMILAR,
    directions: Annotated[
        int, typer.Option(min=1, help="How many of the directions that its leverage comes from.")
    ] = DEFAULT_DIRECTIONS,
    attention: Annotated[
        bool, typer.Option("--attention", help="Load the model and say what it looked at.")
    ] = False,
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Load the model and draw what it looked at; further images of the sample get -2, -3, ...",
        ),
    ] = None,
    max_side: Annotated[int, typer.Option(min=32, help="Longest side of such a drawing, in pixels.")] = 768,
    device: DeviceOption = Device.AUTO,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Say why a sample was selected, or not: its leverage and rank, where they come from, what it is like."""
    with user_errors(verbose=verbose):
        selection = read_selection(declaration_path(store))
        storage = StorageResource()
        with deployment.open_instance(selection) as instance:
            shards = known_shards(instance, selection.name)
        told = explain_sample(
            selection, storage, sample, similar=similar, directions=directions, shards=shards
        )
        seen = None
        if attention or image is not None:
            seen = attention_of(selection, storage, VlmResource(device=device.value), told.sample)
        drawings = _draw(seen, image, max_side) if seen is not None and image is not None else []
        if as_json:
            extra = {} if seen is None else {"attention_map": seen.to_json()}
            print_json({**told.to_json(), **extra, "drawings": list(map(str, drawings))})
        else:
            lines = [
                *told.lines(),
                *(seen.lines() if seen else ()),
                *(("drawn in", str(f)) for f in drawings),
            ]
            for label, value in lines:
                OUT.print(f"{label:<24}{escape(value)}".rstrip(), **PLAIN)
        for problem in told.problems:
            ERR.print(f"[red]inconsistent:[/red] {escape(problem)}", **PLAIN)
        if told.problems:
            raise typer.Exit(1)


def verify(
    store: Annotated[str, typer.Option(help="The store to look at.")],
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compute the basis anew from the moments of all shards and compare; changes nothing."""
    with user_errors(verbose=verbose):
        selection = read_selection(declaration_path(store))
        difference = rebuild_difference(StorageResource().artifacts(selection.store))
        equal = max(difference.values()) <= REBUILD_TOLERANCE
        if as_json:
            print_json({**difference, "equal": equal})
        else:
            for name, value in difference.items():
                OUT.print(f"{name:<24}{value:.2e}", **PLAIN)
            told = "equals" if equal else "differs from"
            OUT.print(f"The basis {told} its rebuild (tolerance {REBUILD_TOLERANCE:g}).", **PLAIN)
        if not equal:
            remedy = f"scalselect run {selection.source} --store {store} --rebuild-basis"
            ERR.print(f"[red]made anew by: {escape(remedy)}[/red]", **PLAIN)
            raise typer.Exit(1)


def print_lineage(lineage: SampleLineage, *, as_json: bool) -> None:
    """Print a sample's lineage; what does not fit in it gives exit code 1."""
    if as_json:
        print_json(lineage.to_json())
    else:
        for label, value in lineage.lines():
            OUT.print(f"{label:<30}{escape(value)}".rstrip(), **PLAIN)
    for problem in lineage.problems:
        ERR.print(f"[red]inconsistent:[/red] {escape(problem)}", **PLAIN)
    if lineage.problems:
        raise typer.Exit(1)


def _draw(seen: SampleAttention, file: Path, max_side: int) -> list[Path]:
    """Write a drawing for each image; the first bears the name that was asked for."""
    files = []
    for number, png in enumerate(seen.pngs(max_side), start=1):
        files.append(file if number == 1 else file.with_stem(f"{file.stem}-{number}"))
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        files[-1].write_bytes(png)
    return files
