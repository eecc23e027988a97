"""The kinds of leftovers that a cleaning may find, and the report of a cleaning."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from typing import Any, Final

from upath import UPath

NAME = "maintenance"
DEFAULT_RETENTION_DAYS: Final = 7.0

_SECONDS_PER_DAY = 86_400
NOT_DUE = "the retention time has not passed"


class Kind(StrEnum):
    """The kinds of things that a store may hold without need."""

    UNFINISHED = "unfinished_files"
    """Leftovers of a killed process: files of artifacts, uncommitted data files of tables, a search table."""
    SET_ASIDE = "set_aside_parts"
    """Vectors that were set aside and are now in a committed table, or belong to a shard that is gone."""
    RETIRED = "retired_moments"
    """Replaced moments that the pool's totals no longer hold."""
    GONE_SHARDS = "gone_shards"
    """All files and tables of a shard that is no longer in the pool."""
    OTHER_MODELS = "tables_of_other_models"
    """Tables that no receipt names and that belong to a model other than the declared one."""
    OLD_VERSIONS = "old_table_versions"
    """Versions of a table that are older than the oldest needed one."""
    LOCKS = "lock_files"
    """Lock files of shards that are no longer in the pool."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file, table or shard that may be unneeded.

    Attributes:
        kind: The kind of thing.
        name: File or table below the store, or shard.
        n_bytes: Its size; for old table versions, the size of their data files.
        why: The reason why it is deleted, or why it is kept.
        count: The number of things, where one name stands for several.
    """

    kind: Kind
    name: str
    n_bytes: int
    why: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class MaintenanceReport:
    """The results of a cleaning, or the expected results in the case of a dry run.

    Attributes:
        removed: Leftovers that were deleted.
        kept: Leftovers that were not deleted, each with the reason.
        retention: The retention time.
        dry_run: Whether nothing was deleted.
    """

    removed: tuple[Leftover, ...]
    kept: tuple[Leftover, ...]
    retention: timedelta
    dry_run: bool

    @property
    def bytes_freed(self) -> int:
        """The size of all that was deleted."""
        return sum(leftover.n_bytes for leftover in self.removed)

    def removed_by_kind(self) -> list[dict[str, Any]]:
        """Kind, reason, count, bytes and a few names of the leftovers that were deleted."""
        return _grouped(self.removed)

    def kept_by_reason(self) -> list[dict[str, Any]]:
        """Kind, reason, count, bytes and a few names of the leftovers that were kept."""
        return _grouped(self.kept)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "dry_run": self.dry_run,
            "retention_days": self.retention.total_seconds() / _SECONDS_PER_DAY,
            "bytes_freed": self.bytes_freed,
            "removed": self.removed_by_kind(),
            "kept": self.kept_by_reason(),
        }


def _grouped(leftovers: Iterable[Leftover]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[Leftover]] = defaultdict(list)
    for leftover in leftovers:
        groups[leftover.kind.value, leftover.why].append(leftover)
    return [
        {
            "kind": kind,
            "why": why,
            "count": sum(item.count for item in group),
            "bytes": sum(item.n_bytes for item in group),
            "names": [item.name for item in group[:5]],
        }
        for (kind, why), group in groups.items()
    ]


Found = tuple[Leftover, Callable[[], None] | None]
"""A leftover with the function that deletes it, or None if the leftover is kept."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file with its size in bytes and its time of change, in seconds since the epoch."""

    path: UPath
    n_bytes: int
    changed: float

    @classmethod
    def at(cls, path: UPath) -> "StoredFile":
        """The file at a path, as it is now."""
        status = path.stat()
        # On a file system without times, every file counts as new.
        return cls(path, status.st_size, status.st_mtime or time.time())


def kept(leftover: Leftover, why: str) -> Found:
    """A leftover that stays, with the reason."""
    return replace(leftover, why=why), None


def total(files: Iterable[StoredFile]) -> int:
    """The size of all files together, in bytes."""
    return sum(file.n_bytes for file in files)


def newest(files: Iterable[StoredFile]) -> float:
    """The latest time of change; 0 if there is no file."""
    return max((file.changed for file in files), default=0.0)


def unlink(files: Iterable[StoredFile]) -> None:
    """Delete files; those that are already gone are ignored."""
    for file in files:
        file.path.unlink(missing_ok=True)
