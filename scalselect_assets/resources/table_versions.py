"""The versions of a LanceDB table: listing them, and removing those that nothing needs."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from operator import attrgetter
from typing import Any

from scalselect_assets.resources.embedding_store import EmbeddingStore

_PIN = "scalselect-needed-"
_NO_VERSION = timedelta(days=36_500)


# LanceDB


class TableRefusedError(RuntimeError):
    """LanceDB did not remove the versions that it was asked to remove; the message says why."""


@dataclass(frozen=True, slots=True)
class TableVersion:
    """One version of a table: its number, its time (seconds since the epoch) and its data files."""

    number: int
    made: float
    n_bytes: int
    n_files: int


@dataclass(frozen=True)
class TableVersions:
    """The operations on LanceDB tables that cleaning needs."""

    store: EmbeddingStore

    @cached_property
    def _connection(self) -> Any:
        import lancedb

        return lancedb.connect(
            str(self.store.folder), storage_options=dict(self.store.storage_options) or None
        )

    def drop(self, table: str) -> None:
        """Remove a table, or the remains of one whose removal was killed."""
        self._connection.drop_table(table, ignore_missing=True)

    def versions(self, table: str) -> list[TableVersion]:
        """The existing versions, by number.

        Raises:
            ValueError: There is no such table, or nothing that can be opened.
            RuntimeError: The table is damaged.
        """
        listed = self._connection.open_table(table).list_versions()
        versions = [
            TableVersion(
                number=int(one["version"]),
                made=one["timestamp"].timestamp(),  # LanceDB gives local time without a zone
                n_bytes=int(one["metadata"]["total_files_size"]),
                n_files=int(one["metadata"]["total_data_files"]),
            )
            for one in listed
        ]
        return sorted(versions, key=attrgetter("number"))

    def prune(self, table: str, last: float, needed: Sequence[int]) -> None:
        """Remove all versions made up to ``last`` (seconds since the epoch) with their data.

        Raises:
            TableRefusedError: The table is damaged, or one of the needed versions would have gone, too,
                because the clock jumped at this very moment; nothing was removed.
        """
        handle = self._connection.open_table(table)
        with _pinned(handle, needed):
            _optimize(handle, timedelta(seconds=time.time() - last - 0.002), delete_unverified=False)

    def remove_uncommitted(self, table: str) -> None:
        """Remove data files that belong to no version; nobody may be writing. Raises as ``prune``."""
        _optimize(self._connection.open_table(table), _NO_VERSION, delete_unverified=True)


def _optimize(handle: Any, older_than: timedelta, *, delete_unverified: bool) -> None:
    try:
        handle.optimize(cleanup_older_than=older_than, delete_unverified=delete_unverified)
    except RuntimeError as error:
        raise TableRefusedError(f"LanceDB refused: {error}") from error


@contextmanager
def _pinned(handle: Any, versions: Sequence[int]) -> Iterator[None]:
    """Tag versions for the length of a block, so that LanceDB keeps them; a killed run's tags go first."""
    _unpin(handle)
    try:
        for version in versions:
            handle.tags.create(f"{_PIN}{version}", version)
        yield
    finally:
        _unpin(handle)


def _unpin(handle: Any) -> None:
    for tag in handle.tags.list():
        if tag.startswith(_PIN):
            handle.tags.delete(tag)
