"""The command line: `scalselect run`, `demo`, `status`, `explain`, `verify`, `clean`, `split`, `ui`.

What a run computes, Dagster computes; this module turns options into a declared selection, opens the store's
Dagster instance, shows progress and says what came out. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, get_args

import dagster as dg
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars

from resources.shard_reader import ShardFormatError, split_shard
from resources.storage import StorageResource
from resources.vlm import VlmResource
from scalselect_assets import deployment
from scalselect_assets.choice_settings import StrategyName, parse_quota
from scalselect_assets.explanation import (
    DEFAULT_SIMILAR,
    SampleAttention,
    attention_of,
)
from scalselect_assets.explanation import explain as explain_sample
from scalselect_assets.exports.spec import parse_exports
from scalselect_assets.maintenance import DEFAULT_RETENTION_DAYS
from scalselect_assets.maintenance import clean as clean_store
from scalselect_assets.method.rank import FixedRank, parse_rank_rule
from scalselect_assets.method.selection import parse_budget
from scalselect_assets.partitions import known_shards
from scalselect_assets.refresh import Refresh, RefreshReport, discover, summary
from scalselect_assets.sample_directions import DEFAULT_DIRECTIONS
from scalselect_assets.sample_lineage import SampleLineage, trace
from scalselect_assets.selection import Selection, read_selection
from scalselect_assets.subspace_basis import REBUILD_TOLERANCE, rebuild_difference
from scalselect_assets.training_dataset import is_complete

PAPER_MODEL = "llava-hf/llava-1.5-7b-hf"
"""The architecture that the published results were measured on."""

T = TypeVar("T")

app = typer.Typer(
    name="scalselect",
    help="Choose what a vision-language model is fine-tuned on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_out, _err = Console(), Console(stderr=True)
_CHOICE: Final = "The choice and its files"
_PLAIN: Final[dict[str, Any]] = {"highlight": False, "soft_wrap": True}


class Device(StrEnum):
    """Where the model runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    """Numbers of the model's weights and activations."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


StoreOption = Annotated[
    str | None,
    typer.Option(help="Folder for all that is computed. (default: .scalselect/<name>)", show_default=False),
]
DeviceOption = Annotated[Device, typer.Option(help="Where the model runs.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show Dagster's log and tracebacks.")]


@app.command()
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
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of what is drawn. (default: 0)", rich_help_panel=_CHOICE)
    ] = None,
    image_tokens: Annotated[
        str | None,
        typer.Option(help="A budget of vision tokens, instead of rows.", rich_help_panel=_CHOICE),
    ] = None,
    text_tokens: Annotated[
        str | None,
        typer.Option(help="A budget of all other tokens, instead of rows.", rich_help_panel=_CHOICE),
    ] = None,
    source_label: Annotated[
        str | None,
        typer.Option(
            help="What names a row's source: source (its field), shard, shard_folder, image_folder or "
            "field:NAME. (default: source)",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(
            help="SOURCE=ROWS or SOURCE=SHARE of the budget that is chosen at least.",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    ceiling: Annotated[
        list[str] | None,
        typer.Option(help="The same, that is chosen at most.", rich_help_panel=_CHOICE),
    ] = None,
    include: Annotated[
        str | None,
        typer.Option(
            help="File of samples that must be chosen: an id, a key or an image's SHA-256 a line.",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    exclude: Annotated[
        str | None,
        typer.Option(help="The same, of samples that must not.", rich_help_panel=_CHOICE),
    ] = None,
    near_duplicates: Annotated[
        float | None,
        typer.Option(
            help="Remove samples within this cosine of one of higher leverage.", rich_help_panel=_CHOICE
        ),
    ] = None,
    evaluation_images: Annotated[
        str | None,
        typer.Option(help="Remove samples whose image is in this folder.", rich_help_panel=_CHOICE),
    ] = None,
    evaluation_texts: Annotated[
        str | None,
        typer.Option(help="Remove samples that hold a text of this file.", rich_help_panel=_CHOICE),
    ] = None,
    export: Annotated[
        list[str] | None,
        typer.Option(
            help="Also write for a trainer: FORMAT or FORMAT:order=score,images=copied; see docs/exports.md.",
            rich_help_panel=_CHOICE,
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
    with _user_errors(verbose=verbose):
        options = {
            "image_root": image_root and _absolute(image_root),
            "target_model": model,
            "model_revision": revision,
            "dtype": dtype and dtype.value,
            "attention_mass": attention_mass,
            "energy": energy,
            "rank": _rank(rank),
            "standardise": standardise,
            "unit_rows": unit_rows,
            "text_only": _text_only(text_only),
            "strategy": strategy,
            "seed": seed,
            "source_label": source_label,
            "include": include and _absolute(include),
            "exclude": exclude and _absolute(exclude),
            "near_duplicates": None if near_duplicates is None else {"cosine": near_duplicates},
            **_wanted(budget, image_tokens, text_tokens),
            **_quotas(floor or [], ceiling or []),
            **_evaluation(evaluation_images, evaluation_texts),
            **_exports(export),
        }
        with _declared(source, store, name, options) as selection:
            _refresh_and_tell(
                selection,
                VlmResource(device=device.value, batch_tokens=batch_tokens, workers=workers),
                as_json=as_json,
                verbose=verbose,
                rebuild_basis=rebuild_basis,
            )


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where pool, model and store are made.")] = Path(".scalselect"),
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Generate a sample pool and a small random VLM, and run the whole path on them."""
    with _user_errors(verbose=verbose):
        from scalselect_assets.demo.model import write_demo_vlm
        from scalselect_assets.demo.pool import write_demo_pool

        pool = write_demo_pool(folder / "demo-pool")
        vlm = write_demo_vlm(folder / "demo-vlm")
        options = {"target_model": str(vlm), "budget": 0.16}
        with _declared(str(pool.root), str(folder / "demo"), "demo", options) as selection:
            _refresh_and_tell(selection, VlmResource(device="cpu"), as_json=as_json, verbose=verbose)
        if not as_json:
            _out.print(
                "\nThe demo model's weights are random, so the path is real and the choice means nothing; "
                "name a real model with [bold]scalselect run --model[/bold].\n"
                "Look at the runs and the lineage: [bold]make dev[/bold] or "
                f"[bold]scalselect ui --store {folder / 'demo'}[/bold]"
            )


@app.command()
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
    with _user_errors(verbose=verbose):
        selection = read_selection(_declaration(store))
        storage = StorageResource()
        if sample is not None:
            with deployment.open_instance(selection) as instance:
                _tell_lineage(trace(selection, storage, instance, sample), as_json=as_json)
            return
        artifacts = storage.artifacts(selection.store)
        discovery = discover(
            storage.samples(selection.source, selection.image_root, selection.store),
            artifacts,
            selection.settle_seconds,
        )
        with deployment.open_instance(selection) as instance:
            refresh = _make_refresh(selection, instance, VlmResource(), _Bars(), verbose=verbose)
            pending = refresh.pending(discovery)
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
            _print_json(state)
            return
        if result:
            _print_summary(selection, result)
        else:
            _out.print("There is no result yet.")
        if pending:
            _out.print(f"Out of date: {', '.join(pending[:20])}; `scalselect run` brings it up to date.")
        else:
            _out.print(f"All {len(discovery.versions)} shards and what follows from them are up to date.")


@app.command()
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
    with _user_errors(verbose=verbose):
        selection = read_selection(_declaration(store))
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
            _print_json({**told.to_json(), **extra, "drawings": list(map(str, drawings))})
        else:
            lines = [
                *told.lines(),
                *(seen.lines() if seen else ()),
                *(("drawn in", str(f)) for f in drawings),
            ]
            for label, value in lines:
                _out.print(f"{label:<24}{escape(value)}".rstrip(), **_PLAIN)
        for problem in told.problems:
            _err.print(f"[red]inconsistent:[/red] {escape(problem)}", **_PLAIN)
        if told.problems:
            raise typer.Exit(1)


@app.command()
def verify(
    store: Annotated[str, typer.Option(help="The store to look at.")],
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compute the basis anew from the moments of all shards and compare; changes nothing."""
    with _user_errors(verbose=verbose):
        selection = read_selection(_declaration(store))
        difference = rebuild_difference(StorageResource().artifacts(selection.store))
        equal = max(difference.values()) <= REBUILD_TOLERANCE
        if as_json:
            _print_json({**difference, "equal": equal})
        else:
            for name, value in difference.items():
                _out.print(f"{name:<24}{value:.2e}", **_PLAIN)
            told = "equals" if equal else "differs from"
            _out.print(f"The basis {told} its rebuild (tolerance {REBUILD_TOLERANCE:g}).", **_PLAIN)
        if not equal:
            remedy = f"scalselect run {selection.source} --store {store} --rebuild-basis"
            _err.print(f"[red]made anew by: {escape(remedy)}[/red]", **_PLAIN)
            raise typer.Exit(1)


@app.command()
def clean(
    store: Annotated[str, typer.Option(help="The store to clean.")],
    retention_days: Annotated[
        float, typer.Option(min=0, help="How long a thing must have been unneeded.")
    ] = DEFAULT_RETENTION_DAYS,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go, and delete nothing.")
    ] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Remove what nothing needs any more: leftovers, old versions, shards that left, other models' tables.

    What left the pool, and tables of another model, go at the second cleaning that finds them unneeded.
    """
    with _user_errors(verbose=verbose):
        selection = read_selection(_declaration(store))
        with deployment.open_instance(selection) as instance:
            report = clean_store(
                selection,
                StorageResource(),
                instance,
                retention=timedelta(days=retention_days),
                dry_run=dry_run,
            )
        if as_json:
            _print_json(report.to_json())
            return
        went = "would go" if dry_run else "removed"
        for verdict, groups in ((went, report.removed_by_kind()), ("kept", report.kept_by_reason())):
            for group in groups:
                told = f"{group['count']:,} {group['kind'].replace('_', ' ')}, {group['bytes']:,} bytes"
                _out.print(f"{verdict:<24}{told}: {escape(group['why'])}", **_PLAIN)
        _out.print(f"{report.bytes_freed:,} bytes {'would be ' if dry_run else ''}freed.", **_PLAIN)


@app.command()
def split(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A JSON array or JSON Lines file.", exists=True, dir_okay=False),
    ],
    rows: Annotated[int, typer.Option(min=1, help="Rows in each shard.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    verbose: VerboseOption = False,
) -> None:
    """Split one large file into shards, row by row, without loading it whole."""
    with _user_errors(verbose=verbose):
        from upath import UPath

        if out.resolve() == file.parent.resolve():
            raise typer.BadParameter(
                f"--out {out} is the file's own folder, where its rows would count twice; name another one"
            )
        result = split_shard(UPath(file.absolute()), rows, out)
        _out.print(f"{result.n_rows:,} rows in {len(result.files)} shards in {out}")
        _out.print(
            "Image paths are relative to the file that they were in: run with "
            f"[bold]--image-root {file.parent}[/bold]"
        )


@app.command()
def ui(
    store: Annotated[str, typer.Option(help="The store whose runs to show.")],
    port: Annotated[int, typer.Option(help="Port on the loopback interface.")] = 3000,
    host: Annotated[str, typer.Option(help="Interface; the UI has no login.")] = "127.0.0.1",
    verbose: VerboseOption = False,
) -> None:
    """Open the Dagster UI on a store: its graph, runs, lineage and checks."""
    with _user_errors(verbose=verbose):
        declaration = _declaration(store)
        selection = read_selection(declaration)
        deployment.open_instance(selection).dispose()
        environment = {
            **os.environ,
            "DAGSTER_HOME": str(deployment.instance_folder(selection)),
            deployment.SELECTIONS_VARIABLE: str(declaration.absolute()),
        }
        environment.setdefault(deployment.TICK_SETTLE_VARIABLE, "0.1")
        _err.print(f"Dagster UI: http://{host}:{port} (stop with Ctrl-C)")
        # By path, and from its own folder: the current one may have `definitions` or `resources` of its own.
        located = importlib.util.find_spec("definitions")
        if located is None or located.origin is None:
            raise RuntimeError("the module `definitions` of this package is not installed; install it again")
        environment["PYTHONSAFEPATH"] = "1"
        folder = str(Path(located.origin).parent)
        command = [sys.executable, "-m", "dagster", "dev", "-f", located.origin, "-d", folder]
        # In this process' place, so that a signal reaches Dagster, which stops what it has started.
        os.execve(sys.executable, [*command, "-h", host, "-p", str(port)], environment)  # noqa: S606


# From options to a declared selection


@contextmanager
def _declared(
    source: str, store: str | None, name: str | None, options: Mapping[str, Any]
) -> Iterator[Selection]:
    """The selection that the options describe over what the store already declares.

    It is written to the store, and taken back where the block fails: what cannot run is not remembered.
    """
    location = _absolute(source)
    store = _absolute(store or str(Path(".scalselect") / (name or _name_of(location))))
    path = Path(store) if "://" not in store else Path(".scalselect") / (name or _name_of(location))
    path = path / deployment.DECLARATION
    before = path.read_text(encoding="utf-8") if path.exists() else None
    known: dict[str, Any] = {"target_model": PAPER_MODEL, "name": name or _name_of(location)}
    if before is not None:
        known = read_selection(path).model_dump()
    if name not in {None, known["name"]}:
        raise typer.BadParameter(f"the selection in {store} is named {known['name']}; give another --store")
    if known.get("source", location) != location:
        raise typer.BadParameter(
            f"the store {store} belongs to the pool {known['source']}; give another --store for {location}"
        )
    if not StorageResource().path(location).exists():
        raise FileNotFoundError(f"no pool at {location}: name the folder (or file) of its shard files")
    given = {key: value for key, value in options.items() if value is not None}
    if "target_model" in given and Path(given["target_model"]).expanduser().is_dir():
        given["target_model"] = _absolute(given["target_model"])
    if given.get("target_model", known["target_model"]) != known["target_model"]:
        known["model_revision"] = None  # it was the other model's
    try:
        selection = Selection(**{**known, **given, "source": location, "store": store})
    except ValidationError as error:
        first = error.errors()[0]
        raise typer.BadParameter(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(selection.to_yaml(in_store="://" not in store), encoding="utf-8")
    try:
        yield selection
    except typer.Exit:
        raise
    except Exception:
        if before is None:
            path.unlink()
        else:
            path.write_text(before, encoding="utf-8")
        raise


def _declaration(store: str) -> Path:
    path = Path(store) / deployment.DECLARATION
    if not path.exists():
        raise typer.BadParameter(f"{store} is not a store: it has no {deployment.DECLARATION}; run first")
    return path


def _absolute(location: str) -> str:
    return location if "://" in location else os.path.abspath(Path(location).expanduser())  # noqa: PTH100


def _name_of(location: str) -> str:
    """A legal asset key from the last part of a location."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", Path(location).stem).strip("_") or "pool"


def _rank(text: str | None) -> str | int | None:
    if text is None:
        return None
    try:
        rule = parse_rank_rule(text)
    except ValueError as error:
        raise typer.BadParameter(f"--rank: {error}") from error
    return rule.k if isinstance(rule, FixedRank) else text


def _budget(option: str, text: str | None) -> int | float | None:
    try:
        return None if text is None else parse_budget(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option}: {error}") from error


def _wanted(budget: str | None, image_tokens: str | None, text_tokens: str | None) -> dict[str, Any]:
    """The one budget that is given, if any."""
    given = {
        "rows": _budget("--budget", budget),
        "image_tokens": _budget("--image-tokens", image_tokens),
        "text_tokens": _budget("--text-tokens", text_tokens),
    }
    (unit, amount), *more = [item for item in given.items() if item[1] is not None] or [("rows", None)]
    if more:
        raise typer.BadParameter("--budget, --image-tokens and --text-tokens exclude each other; give one")
    return {"budget": amount if unit == "rows" else {unit: amount}}


def _text_only(text: str | None) -> str | int | float | None:
    return text if text in {None, "drop", "keep"} else _budget("--text-only", text)


def _quotas(floors: list[str], ceilings: list[str]) -> dict[str, Any]:
    """Quotas by the source; those of other labels are declared in the store's selection.yaml."""
    try:
        quota = parse_quota(floors, ceilings)
    except ValueError as error:
        raise typer.BadParameter(f"--floor, --ceiling: {error}") from error
    return {} if quota is None else {"quotas": [quota]}


def _evaluation(images: str | None, texts: str | None) -> dict[str, Any]:
    if images is None and texts is None:
        return {}
    return {"decontamination": {"images": images and _absolute(images), "texts": texts and _absolute(texts)}}


def _exports(options: list[str] | None) -> dict[str, Any]:
    if not options:
        return {}
    try:
        return {"exports": parse_exports(options)}
    except ValueError as error:
        raise typer.BadParameter(f"--export: {error}") from error


# Running and telling


def _refresh_and_tell(
    selection: Selection,
    vlm: VlmResource,
    *,
    as_json: bool,
    verbose: bool,
    rebuild_basis: bool = False,
) -> None:
    """Refresh, print the summary, and exit with 1 if a shard failed."""
    with deployment.open_instance(selection) as instance, _Bars() as bars:
        report = _make_refresh(
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
        _print_json(result)
    else:
        _print_summary(selection, result)
        _print_work(report)
    for problem in (problems := report.problems()):
        _err.print(f"[red]{escape(problem)}[/red]", **_PLAIN)
    if problems:
        raise typer.Exit(1)


def _make_refresh(
    selection: Selection,
    instance: dg.DagsterInstance,
    vlm: VlmResource,
    bars: "_Bars",
    *,
    verbose: bool,
    rebuild_basis: bool = False,
) -> Refresh:
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


def _tell_lineage(lineage: SampleLineage, *, as_json: bool) -> None:
    """Print a sample's lineage; what does not fit in it gives exit code 1."""
    if as_json:
        _print_json(lineage.to_json())
    else:
        for label, value in lineage.lines():
            _out.print(f"{label:<30}{escape(value)}".rstrip(), **_PLAIN)
    for problem in lineage.problems:
        _err.print(f"[red]inconsistent:[/red] {escape(problem)}", **_PLAIN)
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


def _print_json(value: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def _told_budget(selection: Selection) -> str:
    budget = selection.declared_budget
    return str(budget.amount) if budget.unit == "rows" else f"{budget.amount} {budget.unit.replace('_', ' ')}"


def _print_summary(selection: Selection, result: Mapping[str, Any]) -> None:
    rejected = result["rejected"]
    for label, value in (
        ("rows in", f"{result['rows']:,}"),
        ("embedded", f"{result['embedded']:,}"),
        ("rejected", f"{sum(rejected.values()):,}"),
        *((f"  {reason}", f"{count:,}") for reason, count in rejected.items()),
        ("rank k", f"{result['rank']} ({result['energy']:.1%} of the energy)"),
        *(
            [("basis moved", f"{moved['score_change']:.2g} (bound on the mean change of a score)")]
            if (moved := result["basis_drift"])
            else []
        ),
        ("selected", f"{result['selected']:,} ({selection.strategy}, budget {_told_budget(selection)})"),
        ("subset", result["selected_subset"]),
        ("dataset", result["training_dataset"]),
        *((name.replace("_", " ", 1), place) for name, place in result.items() if name.startswith("export_")),
        *([("report", result["report"])] if "report" in result else []),
        ("lineage", result["manifest"]),
    ):
        _out.print(f"{label:<24}{escape(str(value))}", **_PLAIN)


def _print_work(report: RefreshReport) -> None:
    if report.unsettled:
        _out.print(
            f"Still being written, and left as they were: {', '.join(report.unsettled[:20])}; "
            "run again when that has ended."
        )
    if not report.runs and not report.failed:
        _out.print(
            "Nothing to do: everything else is up to date."
            if report.unsettled
            else "Nothing to do: everything is up to date."
        )
        return
    _out.print(
        f"{len(report.embedded)} shards embedded ({report.computed_rows:,} samples computed, "
        f"{report.reused_rows:,} taken over), {len(report.added)} new, {len(report.removed)} removed, "
        f"{len(report.runs)} Dagster runs.",
        **_PLAIN,
    )


class _Bars:
    """Progress of the embedding on the terminal: rows, shards, rows per second, time left."""

    def __init__(self) -> None:
        self._bars = RichBars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=_err,
            transient=True,
            disable=not _err.is_terminal,
        )
        self._shards: TaskID | None = None
        self._rows: TaskID | None = None

    def __enter__(self) -> "_Bars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def planned(self, n_shards: int, n_rows: int) -> None:
        """Set the totals."""
        if n_shards:
            self._shards = self._bars.add_task("shards", total=n_shards, rate="")
            self._rows = self._bars.add_task("samples", total=n_rows, rate="")

    def track(self, rows: Iterable[T], shard: str, n_rows: int, log: logging.Logger) -> Iterator[T]:  # noqa: ARG002
        """Pass ``rows`` through and move the bars."""
        for row in rows:
            yield row
            if self._rows is not None:
                self._bars.advance(self._rows)
                speed = self._bars.tasks[self._rows].speed
                self._bars.update(self._rows, rate=f"{speed:.1f}/s" if speed else "")
        if self._shards is not None:
            self._bars.advance(self._shards)


@contextmanager
def _user_errors(*, verbose: bool) -> Iterator[None]:
    """Failures as one message and exit code 1; with --verbose as the traceback."""
    logging.getLogger("scalselect").setLevel(logging.INFO if verbose else logging.CRITICAL)
    try:
        yield
    except (typer.Exit, typer.BadParameter):
        raise
    except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
        _err.print("Interrupted; what was computed is kept, and the next run goes on from there.")
        raise typer.Exit(1) from None
    except Exception as error:
        if verbose:
            raise
        told = isinstance(error, (OSError, RuntimeError, ShardFormatError, ValueError))
        message = str(error) if told else f"{type(error).__name__}: {error}"
        _err.print(f"[red]error:[/red] {escape(message)}", **_PLAIN)
        raise typer.Exit(1) from error


def main() -> None:
    """Entry point of the ``scalselect`` command."""
    # LanceDB warns of every table that does not exist before it is written for the first time.
    os.environ.setdefault("LANCEDB_LOG", "error")
    app()
