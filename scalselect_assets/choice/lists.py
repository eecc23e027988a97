"""Lists of samples that must, or must not, be chosen."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from upath import UPath

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.storage import StorageResource


class SampleListError(RuntimeError):
    """A list of samples cannot be read; the message names the file and what it should be."""


@dataclass(frozen=True, slots=True)
class Listed:
    """The samples of a list, found in the pool.

    Attributes:
        rows: (m,) int64, places of the rows that an entry names, ascending.
        unknown: Entries that name no embedded row.
    """

    rows: NDArray[np.int64]
    unknown: tuple[str, ...]


_COLUMNS = ("sample_key", "id", "source_id", "image_sha256")
"""Names of columns and members that hold what an entry may be."""


def read_list(path: UPath) -> list[str]:
    """The entries of a list of samples, each once.

    A text file has an entry a line; empty lines and those that begin with # do not count. A CSV or TSV file
    has a header with one of `_COLUMNS`, or no header and one column. JSON is a list of entries or of objects
    with one of `_COLUMNS`, or the same in lines; ``selected_ids.jsonl`` of an export is such a list.

    Raises:
        SampleListError: The file cannot be read as any of them.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise SampleListError(
            f"the list {path} cannot be read ({error}); it is a UTF-8 text file with a source id, a sample "
            "key or the SHA-256 of an image in each line, or the same as CSV or JSON"
        ) from error
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        entries = _in_table(text, "," if kind == ".csv" else "\t", path)
    elif kind in (".json", ".jsonl", ".ndjson"):
        entries = _in_json(text, path)
    else:
        entries = [line.strip() for line in text.splitlines() if not line.lstrip().startswith("#")]
    return list(dict.fromkeys(entry for entry in entries if entry))


_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)
"""Ids that are numbers keep their spelling."""


def _in_table(text: str, separator: str, path: UPath) -> list[str]:
    rows = [row for row in csv.reader(text.splitlines(), delimiter=separator) if any(map(str.strip, row))]
    if not rows:
        return []
    header = [name.strip().lower() for name in rows[0]]
    column = next((header.index(name) for name in _COLUMNS if name in header), None)
    if column is not None:
        return [row[column].strip() for row in rows[1:] if len(row) > column]
    if len(header) == 1:
        return [row[0].strip() for row in rows]
    raise SampleListError(
        f"the list {path} has the columns {', '.join(header)}; one of them has to be named "
        f"{', '.join(_COLUMNS)}, as it holds the entries"
    )


def _in_json(text: str, path: UPath) -> list[str]:
    try:
        if text.lstrip().startswith("["):
            values = json.loads(text, parse_int=str, parse_float=str)
        else:
            values = [
                json.loads(line, parse_int=str, parse_float=str) for line in text.splitlines() if line.strip()
            ]
    except (json.JSONDecodeError, RecursionError) as error:
        raise SampleListError(
            f"the list {path} is not JSON ({error}); write a JSON list of entries, or one on each line"
        ) from error
    return [entry for value in values for entry in _entry(value, path)]


def _entry(value: object, path: UPath) -> list[str]:
    if isinstance(value, str):
        return [value.strip()]
    if isinstance(value, dict):
        named = next((value[name] for name in _COLUMNS if isinstance(value.get(name), str)), None)
        if named is not None:
            return [named]
    raise SampleListError(
        f"the list {path} holds {json.dumps(value)[:80]}; an entry is a string, a number, or an object with "
        f"one of {', '.join(_COLUMNS)}"
    )


def find_listed(rows: pl.DataFrame, entries: Sequence[str]) -> Listed:
    """The rows that the entries of a list name: by source id, by sample key, or by an image's SHA-256."""
    listed = pl.DataFrame({"entry": list(entries)}, schema={"entry": pl.String()})
    names = (
        rows.with_row_index("place")
        .select("place", entry=pl.concat_list("source_id", "sample_key", "image_sha256"))
        .explode("entry")
        .join(listed, on="entry", how="semi")
    )
    found = set(names["entry"])
    return Listed(
        names["place"].unique().sort().cast(pl.Int64).to_numpy(),
        tuple(entry for entry in entries if entry not in found),
    )


@dataclass(frozen=True, slots=True)
class Lists:
    """The samples that must, and that must not, be chosen."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]

    @classmethod
    def read(cls, selection: Selection, storage: StorageResource) -> "Lists":
        """The declared lists.

        Raises:
            SampleListError: One cannot be read.
        """
        include, exclude = (
            () if place is None else tuple(read_list(storage.path(place)))
            for place in (selection.include, selection.exclude)
        )
        return cls(include, exclude)

    @property
    def version(self) -> str:
        """The hash of all entries."""
        return digest(self.include, self.exclude)
