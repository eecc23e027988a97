"""Options that several commands share, and the declaration in a store that options change."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from scalselect_assets import ASSET_MODULES, deployment
from scalselect_assets.declaration.selection import NO_CREDENTIALS, Selection
from scalselect_assets.declaration.selection_file import read_selection
from scalselect_assets.resources.artifacts import replace_text
from scalselect_assets.resources.shown_text import has_credentials
from scalselect_assets.resources.storage import StorageResource

PAPER_MODEL = "llava-hf/llava-1.5-7b-hf"
"""The model that the published results were measured on."""


class Device(StrEnum):
    """Devices that the model can run on."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class ImagePlaceName(StrEnum):
    """The place of a row's images in the prompt."""

    FIRST = "first"
    AS_WRITTEN = "as_written"


class Dtype(StrEnum):
    """Number types of the model's weights and activations."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


_OF_THE_MODEL = ("model_revision", "image_size", "min_pixels", "max_pixels", "max_tiles")
"""Settings that belong to one model; they are dropped when a run names another model."""

DeviceOption = Annotated[Device, typer.Option(help="Device that the model runs on.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show Dagster's log and tracebacks.")]


# From options to a declared selection


@contextmanager
def declared_from_options(
    source: str, store: str | None, name: str | None, options: Mapping[str, Any]
) -> Iterator[Selection]:
    """The selection that the options describe, on top of the declaration that the store already has.

    The declaration is written to the store, and restored if the block fails: what cannot run is not kept. A
    first run that fails after it has computed something keeps its declaration.
    """
    for place in (source, store):
        if place is not None and has_credentials(place):
            raise typer.BadParameter(NO_CREDENTIALS)
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
    selection = _declared_over(known, options, location, store)
    replace_text(path, selection.to_yaml(in_store="://" not in store))
    try:
        yield selection
    except typer.Exit:
        raise
    except Exception:
        if before is not None:
            replace_text(path, before)
        elif not _holds_results(path.parent):
            path.unlink()
        raise


def _declared_over(known: dict[str, Any], options: Mapping[str, Any], location: str, store: str) -> Selection:
    """The known settings of a selection, replaced by the options that are given.

    Raises:
        typer.BadParameter: The settings do not make a valid selection.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if "target_model" in given and Path(given["target_model"]).expanduser().is_dir():
        given["target_model"] = absolute_place(given["target_model"])
    if given.get("target_model", known["target_model"]) != known["target_model"]:
        known |= dict.fromkeys(_OF_THE_MODEL)  # they belonged to the other model
    try:
        selection = Selection(**{**known, **given, "source": location, "store": store})
    except ValidationError as error:
        first = error.errors()[0]
        raise typer.BadParameter(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return selection


def _holds_results(store: Path) -> bool:
    """Whether anything was computed: then the store keeps the declaration by which it can be opened."""
    return any((store / asset).is_dir() for asset in ASSET_MODULES)


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
    """A local path made absolute; a URI unchanged."""
    return location if "://" in location else os.path.abspath(Path(location).expanduser())  # noqa: PTH100


def _name_of(location: str) -> str:
    """A legal asset key from the last part of a location."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", Path(location).stem).strip("_") or "pool"
