"""Reading a declaration from its YAML file."""

from pathlib import Path
from typing import Any

import yaml

from scalselect_assets.declaration.selection import DECLARATION_TYPE, Selection
from scalselect_assets.resources.shown_text import masked

_EARLIER_TYPES = ("scalselect_assets.selection.Selection",)  # declared by stores of earlier releases


class SelectionFileError(ValueError):
    """A declaration cannot be read; the message names the file and the fault."""


def _absolute(place: str, declaration: Path) -> str:
    """A path of a declaration made absolute; it is relative to the folder of the file."""
    return str((declaration.parent / Path(place).expanduser()).absolute())


def _attributes(declared: object, path: Path) -> dict[str, Any]:
    """The attributes of a declaration of one of the accepted types."""
    if not isinstance(declared, dict):
        raise SelectionFileError(
            f"{path} does not hold a mapping; write `type: {DECLARATION_TYPE}` and `attributes`"
        )
    if (kind := declared.get("type")) not in (DECLARATION_TYPE, *_EARLIER_TYPES):
        raise SelectionFileError(
            f"{path} declares the type {kind!r}; a selection has `type: {DECLARATION_TYPE}`, or "
            f"{' or '.join(_EARLIER_TYPES)} as earlier releases wrote"
        )
    attributes = declared.get("attributes") or {}
    if not isinstance(attributes, dict):
        raise SelectionFileError(
            f"{path} has the `attributes` {attributes!r}; write one `name: value` a line"
        )
    return dict(attributes)


def read_selection(path: Path) -> Selection:
    """Read one declaration; relative local paths in it are relative to the file's folder.

    A target model that begins with a dot is a path; otherwise it may be a hub id. The type that earlier
    releases wrote is accepted, too, so that their stores still open.

    Raises:
        SelectionFileError: The file is not YAML or not of this type, or an attribute is unknown, missing or
            out of range.
    """
    try:
        declared = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SelectionFileError(masked(f"cannot read the selection {path}: {error}")) from error
    attributes = _attributes(declared, path)
    for name in ("source", "store", "image_root", "target_model", "include", "exclude"):
        value = attributes.get(name)
        if not isinstance(value, str) or "://" in value:
            continue
        if name != "target_model" or value.startswith((".", "~")):
            attributes[name] = _absolute(value, path)
    if isinstance(evaluation := attributes.get("decontamination"), dict):
        attributes["decontamination"] = {
            name: _absolute(value, path)
            if name in {"images", "texts"} and isinstance(value, str) and "://" not in value
            else value
            for name, value in evaluation.items()
        }
    try:
        # Dagster's templating is not used, because it would read a name of digits as a number.
        return Selection.model_validate(attributes)
    except ValueError as error:
        raise SelectionFileError(masked(f"the selection {path} is not valid: {error}")) from error
