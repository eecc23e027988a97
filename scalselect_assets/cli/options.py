"""Options of the command line, and the declaration that they describe."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic import ValidationError

from scalselect_assets import deployment
from scalselect_assets.declaration.choice_settings import parse_quota
from scalselect_assets.declaration.export_specs import parse_exports
from scalselect_assets.declaration.selection import Selection, read_selection
from scalselect_assets.method.choice.budget import parse_budget
from scalselect_assets.method.subspace.rank import FixedRank, parse_rank_rule
from scalselect_assets.resources.storage import StorageResource

PAPER_MODEL = "llava-hf/llava-1.5-7b-hf"
"""The architecture that the published results were measured on."""
CHOICE_PANEL: Final = "The choice and its files"


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


# From options to a declared selection


@contextmanager
def declared_from_options(
    source: str, store: str | None, name: str | None, options: Mapping[str, Any]
) -> Iterator[Selection]:
    """The selection that the options describe over what the store already declares.

    It is written to the store, and taken back where the block fails: what cannot run is not remembered.
    """
    location = absolute_place(source)
    store = absolute_place(store or str(Path(".scalselect") / (name or _name_of(location))))
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
        given["target_model"] = absolute_place(given["target_model"])
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


def declaration_path(store: str) -> Path:
    """The declaration in a store.

    Raises:
        typer.BadParameter: The folder is not a store.
    """
    path = Path(store) / deployment.DECLARATION
    if not path.exists():
        raise typer.BadParameter(f"{store} is not a store: it has no {deployment.DECLARATION}; run first")
    return path


def absolute_place(location: str) -> str:
    """A local path made absolute; a URI as it is."""
    return location if "://" in location else os.path.abspath(Path(location).expanduser())  # noqa: PTH100


def _name_of(location: str) -> str:
    """A legal asset key from the last part of a location."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", Path(location).stem).strip("_") or "pool"


def rank_option(text: str | None) -> str | int | None:
    """The value of ``--rank`` as a declaration writes it."""
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


def wanted_budget(budget: str | None, image_tokens: str | None, text_tokens: str | None) -> dict[str, Any]:
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


def text_only_option(text: str | None) -> str | int | float | None:
    """The value of ``--text-only`` as a declaration writes it."""
    return text if text in {None, "drop", "keep"} else _budget("--text-only", text)


def quota_options(floors: list[str], ceilings: list[str]) -> dict[str, Any]:
    """Quotas by the source; those of other labels are declared in the store's selection.yaml."""
    try:
        quota = parse_quota(floors, ceilings)
    except ValueError as error:
        raise typer.BadParameter(f"--floor, --ceiling: {error}") from error
    return {} if quota is None else {"quotas": [quota]}


def evaluation_options(images: str | None, texts: str | None) -> dict[str, Any]:
    """The declared evaluation set, if an option names one."""
    if images is None and texts is None:
        return {}
    return {
        "decontamination": {
            "images": images and absolute_place(images),
            "texts": texts and absolute_place(texts),
        }
    }


def near_duplicates_option(text: str | None) -> dict[str, Any]:
    """The declared removal of near-duplicates, if the option is given."""
    if text is None:
        return {}
    try:
        return {"near_duplicates": {"cosine": text if text == "suggested" else float(text)}}
    except ValueError as error:
        raise typer.BadParameter(
            f"--near-duplicates: {text!r} is neither a cosine, such as 0.995, nor `suggested`"
        ) from error


def export_options(options: list[str] | None) -> dict[str, Any]:
    """The declared exports, if an option names one."""
    if not options:
        return {}
    try:
        return {"exports": parse_exports(options)}
    except ValueError as error:
        raise typer.BadParameter(f"--export: {error}") from error
