"""Finding one sample by its key, its id or its place."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import polars as pl

from scalselect_assets.choice import selected_subset
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.pool import raw_samples
from scalselect_assets.resources.artifacts import (
    ArtifactCorruptError,
    ArtifactMissingError,
    ArtifactStore,
)
from scalselect_assets.subspace.basis_header import read_basis_header

SHORTEST_PREFIX: Final = 6
_CANDIDATES_SHOWN = 10


class SampleKeyError(ValueError):
    """No sample goes by what was given, or several do; the message lists them, or where was looked."""


@dataclass(frozen=True, slots=True)
class SamplePlace:
    """A row of `raw_samples`.

    Attributes:
        shard: The shard that it is a row of.
        row: Its position in the shard, from 0.
        line: The line of the shard file on which it starts, from 1.
        sample_key: Its content key.
        source_id: Its own id, if it has one.
    """

    shard: str
    row: int
    line: int
    sample_key: str
    source_id: str | None

    def __str__(self) -> str:
        named = "" if self.source_id is None else f"  (id {self.source_id})"
        return f"{self.shard}#{self.row}  {self.sample_key}{named}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "sample_key": self.sample_key,
            "source_id": self.source_id,
            "shard": self.shard,
            "row": self.row,
            "line": self.line,
        }


def find_sample(
    selection: Selection, artifacts: ArtifactStore, shards: Iterable[str], key: str
) -> SamplePlace:
    """The one sample that goes by ``key``.

    Reads four columns of each shard's rows, one shard at a time.

    Args:
        selection: The selection that the sample belongs to.
        artifacts: Files of its store.
        shards: Shards to search.
        key: A sample key or a prefix of one, from 6 characters on; a row's own id, verbatim; or
            ``<shard>#<row>``, which tells samples apart that have the same key or id.

    Raises:
        SampleKeyError: No sample goes by it, or several do.
    """
    exact: list[SamplePlace] = []
    by_prefix: list[SamplePlace] = []
    unread: list[str] = []
    n_rows, looked_in = 0, sorted(shards)
    for shard in looked_in:
        try:
            rows = artifacts.read_frame(
                raw_samples.NAME, shard, columns=["row", "line", "sample_key", "source_id"]
            )[0]
        except (ArtifactMissingError, ArtifactCorruptError):
            unread.append(shard)
            continue
        n_rows += rows.height
        is_named = (pl.col("sample_key") == key) | (pl.col("source_id") == key)
        if key.startswith(f"{shard}#"):
            is_named |= pl.col("row").cast(pl.String) == key.removeprefix(f"{shard}#")
        exact += _places(shard, rows.filter(is_named))
        if len(key) >= SHORTEST_PREFIX and len(by_prefix) <= _CANDIDATES_SHOWN:
            by_prefix += _places(shard, rows.filter(pl.col("sample_key").str.starts_with(key)))
    found = exact or by_prefix
    if len(found) == 1:
        return found[0]
    if not found:
        looked = (
            f"no sample {key!r} among {n_rows:,} rows of {len(looked_in) - len(unread)} shards in "
            f"{selection.store}: looked for a sample key or a prefix of one from {SHORTEST_PREFIX} "
            "characters on, an id, and <shard>#<row>"
        )
        raise SampleKeyError(looked + _unread(selection, unread) + _chosen_before(selection, artifacts, key))
    listed = "".join(f"\n  {place}" for place in found[:_CANDIDATES_SHOWN])
    more = "\n  and more" if len(found) > _CANDIDATES_SHOWN else ""
    raise SampleKeyError(f"several samples go by {key!r}; name one of them by <shard>#<row>:{listed}{more}")


def last_shards(artifacts: ArtifactStore) -> set[str]:
    """The shards that the last basis is of; none where there is no basis that can be read."""
    with suppress(ArtifactMissingError, ArtifactCorruptError):
        return set(read_basis_header(artifacts).shards)
    return set()


def remedy(selection: Selection) -> str:
    """The command that brings a selection's results up to date, as the end of a message."""
    return f"`scalselect run {selection.source} --store {selection.store}` brings it up to date"


def _places(shard: str, rows: pl.DataFrame) -> list[SamplePlace]:
    wanted = rows.select("row", "line", "sample_key", "source_id")
    return [SamplePlace(shard, *row) for row in wanted.iter_rows()]


def _unread(selection: Selection, shards: list[str]) -> str:
    if not shards:
        return ""
    return f"; {len(shards)} shards have no rows that can be read, {shards[0]} for one: {remedy(selection)}"


def _chosen_before(selection: Selection, artifacts: ArtifactStore, key: str) -> str:
    try:
        subset, _ = artifacts.read_frame(selected_subset.NAME, columns=["sample_key", "shard"])
    except (ArtifactMissingError, ArtifactCorruptError):
        return ""
    chosen = subset.filter(pl.col("sample_key").str.starts_with(key))
    if not chosen.height or len(key) < SHORTEST_PREFIX:
        return ""
    return (
        f"; it is in the selected subset, but no longer in its shard {chosen['shard'][0]}: "
        f"{remedy(selection)}"
    )
