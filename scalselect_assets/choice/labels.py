"""Labels of a row: its source, its shard, its folder, or one of its fields."""

import json
import re
from collections.abc import Callable
from pathlib import PurePosixPath

import polars as pl

NO_LABEL = "(none)"
_FIRST_FOLDER = re.compile(r"^(?:\./|/)*([^/]+)/")


def label_of(label: str, shard: str) -> pl.Expr:
    """The expression of a label over a table's columns; the same as `source_of` gives."""
    match label:
        case "shard":
            return pl.lit(shard)
        case "shard_folder":
            return pl.lit(_folder(shard))
        case "image_folder":
            return pl.col("images").list.first().str.extract(_FIRST_FOLDER.pattern).fill_null(NO_LABEL)
    value = pl.col("text").str.json_path_match(
        "$" + "".join(f"[{json.dumps(name)}]" for name in _field(label))
    )
    if label == "source":
        named = value.str.strip_chars()
        return pl.when(named != "").then(named).otherwise(pl.lit(_folder(shard)))
    return value.fill_null(NO_LABEL)


def source_of(label: str) -> Callable[[str, str], str]:
    """From a shard and the text of one of its rows to the row's label, also for rows that have no vector."""

    def of(shard: str, text: str) -> str:
        if label == "shard":
            return shard
        if label == "shard_folder":
            return _folder(shard)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        if label == "image_folder":
            return _image_folder(row)
        value = row
        for name in _field(label):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, str):
            value = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        if label == "source":
            return (value or "").strip() or _folder(shard)
        return NO_LABEL if value is None else value

    return of


def _folder(shard: str) -> str:
    """The folder of a shard below the pool, or its own name where it is in none."""
    path = PurePosixPath(shard)
    return str(path.parent) if len(path.parts) > 1 else path.stem


def _field(label: str) -> list[str]:
    """The names that lead to a field of the row."""
    return label.removeprefix("field:").split(".")


def _image_folder(row: object) -> str:
    """The first folder of the first image that a row names, whatever else is wrong with it."""
    named = [row.get(field) for field in ("images", "image")] if isinstance(row, dict) else []
    for value in named:
        for image in value if isinstance(value, list) else [value]:
            if isinstance(image, str):
                found = _FIRST_FOLDER.match(image)
                return found[1] if found else NO_LABEL
    return NO_LABEL
