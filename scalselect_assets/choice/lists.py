"""Lists of samples that must, or must not, be chosen."""

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


def read_list(path: UPath) -> list[str]:
    """The entries of a list of samples: one a line; empty lines and those that begin with # do not count.

    Raises:
        SampleListError: The file cannot be read as UTF-8 text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise SampleListError(
            f"the list {path} cannot be read ({error}); it is a UTF-8 text file with a source id, a sample "
            "key or the SHA-256 of an image in each line"
        ) from error
    return list(
        dict.fromkeys(entry for line in lines if (entry := line.strip()) and not entry.startswith("#"))
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
        """Of their entries."""
        return digest(self.include, self.exclude)
