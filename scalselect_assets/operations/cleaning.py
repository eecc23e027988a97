"""Cleaning a store: it removes what nothing refers to any more, once that has lasted the retention time.

Nothing else of the project deletes what took work to make, so a store grows: replaced tables keep their old
versions, a second model has tables of its own, shards leave the pool, killed processes leave files behind.
`clean` removes these, alone on the store; `Kind` lists them. What a receipt of a shard in the pool names
stays, and so does what the basis, the pool's totals or the manifest name, whatever its age.

Time. A thing's age counts from the later of two times: its own (of its files or table versions, or of what
replaced them) and, for shards that left the pool and for tables of another model, the time when a cleaning
first found them unneeded, which is noted in the store: that a disk was away for a night, or that a selection
goes back to its last model, must not cost what was computed months ago. So these go at the second cleaning
at the earliest, unless the retention time is 0. Times in the future count as now: a clock that went back, or
files and notes from when it was ahead, make a cleaning remove less. Under a clock that is ahead, unneeded
things go too early by as much, which cannot be told from time that passed; what is referred to never goes:
a table's needed versions are tagged meanwhile, and LanceDB refuses to remove those.

Crashes. What refers goes before what is referred to (a receipt before its table), and a part of a shard's
outputs counts as none, so after a kill at any point the store is whole for a refresh, and the next cleaning
goes on. Costs: one stat per file, a header or a receipt per shard, opening each table (milliseconds).
"""

import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from functools import cached_property, partial
from itertools import pairwise
from operator import attrgetter
from typing import Any, Final

import dagster as dg
from pydantic import Field
from upath import UPath

from resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from resources.embedding_store import EmbeddingStore
from resources.image_root import is_local
from resources.names import decode_name, encode_name
from resources.search_table import SEARCH_TABLE
from resources.storage import StorageResource
from resources.vlm import CARDS, model_signature
from scalselect_assets import (
    ASSET_MODULES,
    attention_embeddings,
    decontamination,
    embedding_moments,
    image_hashes,
    importance_scores,
    pool_moments,
    raw_samples,
    reuse,
    subspace_basis,
    training_dataset,
)
from scalselect_assets.method.interrupts import deferred
from scalselect_assets.partitions import known_shards
from scalselect_assets.selection import Selection

NAME = "maintenance"
DEFAULT_RETENTION_DAYS: Final = 7.0

_SECONDS_PER_DAY = 86_400
_WRITING = re.compile(r"\.writing-[0-9a-f]{32}")  # as `ArtifactStore` names a file until it is complete
_PIN = "scalselect-needed-"
_NOT_DUE = "the retention time has not passed"
# Versions made closer together are left alone: LanceDB removes by time, and reads the clock itself.
_APART_SECONDS = 1.0
_NO_VERSION = timedelta(days=36_500)
# The first is what makes the others count.
_OUTPUTS = (
    (attention_embeddings.NAME, ".json"),
    (importance_scores.NAME, ".parquet"),
    (embedding_moments.NAME, ".safetensors"),
    (attention_embeddings.REJECTED, ".parquet"),
    (raw_samples.NAME, ".parquet"),
    (decontamination.NAME, ".parquet"),
    (image_hashes.IMAGE_HASHES, ".parquet"),
)


class Kind(StrEnum):
    """What a store may hold without need."""

    UNFINISHED = "unfinished_files"
    """What a killed process left: files of artifacts, uncommitted data files of tables, a search table."""
    SET_ASIDE = "set_aside_parts"
    """Vectors that were set aside and are in a committed table by now, or whose shard is gone."""
    RETIRED = "retired_moments"
    """Replaced moments that the pool's totals hold no longer."""
    GONE_SHARDS = "gone_shards"
    """Everything of a shard that is no longer in the pool."""
    OTHER_MODELS = "tables_of_other_models"
    """Tables of a model other than the declared one that no receipt names."""
    OLD_VERSIONS = "old_table_versions"
    """Versions of a table from before the oldest one that is needed."""
    LOCKS = "lock_files"
    """Of shards that are no longer in the pool."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that may be unneeded.

    Attributes:
        kind: What it is.
        name: File or table below the store, or shard.
        n_bytes: Its size; of old table versions, that of their data files.
        why: Why it goes, or why it is kept.
        count: How many there are of it, where one name stands for several.
    """

    kind: Kind
    name: str
    n_bytes: int
    why: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class MaintenanceReport:
    """What a cleaning did, or would do.

    Attributes:
        removed: What went.
        kept: What might have gone, and why it did not.
        retention: The retention time.
        dry_run: Whether nothing was deleted.
    """

    removed: tuple[Leftover, ...]
    kept: tuple[Leftover, ...]
    retention: timedelta
    dry_run: bool

    @property
    def bytes_freed(self) -> int:
        """Of all that went."""
        return sum(leftover.n_bytes for leftover in self.removed)

    def removed_by_kind(self) -> list[dict[str, Any]]:
        """Kind, reason, count, bytes and a few names of what went."""
        return _grouped(self.removed)

    def kept_by_reason(self) -> list[dict[str, Any]]:
        """Kind, reason, count, bytes and a few names of what was kept."""
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


def clean(
    selection: Selection,
    storage: StorageResource,
    instance: dg.DagsterInstance,
    *,
    retention: timedelta,
    dry_run: bool = False,
) -> MaintenanceReport:
    """Remove from a selection's store what nothing has needed for the retention time.

    Args:
        selection: Whose store.
        storage: Opens pool and store.
        instance: Knows the shards that the last refresh found.
        retention: How long a thing must have been unneeded.
        dry_run: Delete nothing, and say what would go.

    Raises:
        StoreBusyError: Somebody is at work on the store.
        ArtifactCorruptError: Basis, totals or manifest cannot be read, so what they need is not known.
        FileNotFoundError: The pool does not exist, so which shards left it is not known.
        ValueError: The retention time is negative.
    """
    if retention < timedelta(0):
        raise ValueError(f"Got a retention time of {retention}; it is zero or more.")
    removed, kept = [], []
    with storage.locks(selection.store).alone():
        survey = _Survey(selection, storage, instance, retention.total_seconds())
        found = list(survey.found())
        if not dry_run:
            survey.write_notes()
        for leftover, remove in found:
            if remove is None:
                kept.append(leftover)
                continue
            try:
                if not dry_run:
                    remove()
            except _TableRefusedError as error:
                kept.append(replace(leftover, why=str(error)))
            else:
                removed.append(leftover)
    return MaintenanceReport(tuple(removed), tuple(kept), retention, dry_run)


class MaintenanceConfig(dg.Config):
    """What a person may ask of one cleaning."""

    retention_days: float = Field(
        default=DEFAULT_RETENTION_DAYS,
        ge=0,
        description="How long a thing must have been unneeded before it goes.",
    )
    dry_run: bool = Field(default=False, description="Delete nothing, and say what would go.")


def maintenance_job(selection: Selection) -> dg.JobDefinition:
    """Cleaning the store as a job; what went stands in an observation of the embeddings, by size the most."""

    @dg.op(name=selection.job_name("maintenance_op"), description="Remove what nothing needs any more.")
    def maintenance_op(
        context: dg.OpExecutionContext, config: MaintenanceConfig, storage: StorageResource
    ) -> None:
        report = clean(
            selection,
            storage,
            context.instance,
            retention=timedelta(days=config.retention_days),
            dry_run=config.dry_run,
        )
        observation = dg.AssetObservation(
            selection.key(attention_embeddings.NAME),
            metadata={
                "bytes_freed": report.bytes_freed,
                "retention_days": config.retention_days,
                "dry_run": report.dry_run,
                "removed": _table(report.removed_by_kind()),
                "kept": _table(report.kept_by_reason()),
            },
        )
        with deferred():
            context.log_event(observation)

    @dg.job(
        name=selection.job_name(NAME),
        executor_def=dg.in_process_executor,
        description="Remove what nothing has needed for the retention time: leftovers of killed processes, "
        "shards that left the pool, tables of other models, old table versions. Works alone on the store.",
    )
    def maintenance() -> None:
        maintenance_op()

    return maintenance


def _table(groups: Sequence[dict[str, Any]]) -> dg.TableMetadataValue:
    return dg.MetadataValue.table(
        [dg.TableRecord({**group, "names": ", ".join(group["names"])}) for group in groups],
        schema=dg.TableSchema(
            [
                dg.TableColumn("kind"),
                dg.TableColumn("why"),
                dg.TableColumn("count", "int"),
                dg.TableColumn("bytes", "int"),
                dg.TableColumn("names", description="The first five."),
            ]
        ),
    )


_Found = tuple[Leftover, Callable[[], None] | None]  # and how to remove it, or none where it is kept


@dataclass(frozen=True, slots=True)
class _File:
    path: UPath
    n_bytes: int
    changed: float

    @classmethod
    def at(cls, path: UPath) -> "_File":
        status = path.stat()
        # Where a file system tells no times, a file is always new.
        return cls(path, status.st_size, status.st_mtime or time.time())


class _Survey:
    """What a store holds and who needs it, as it is while nobody else is at work on it."""

    def __init__(
        self, selection: Selection, storage: StorageResource, instance: dg.DagsterInstance, retention: float
    ) -> None:
        self._artifacts = storage.artifacts(selection.store)
        if not is_local(self._artifacts.root):
            self._artifacts.root.fs.invalidate_cache()  # listings are kept for the life of a process
        self._embeddings = storage.embeddings(selection.store)
        self._tables = _Tables(self._embeddings)
        self._locks = storage.locks(selection.store).folder
        self._now, self._retention = time.time(), retention
        self._present = _present_fingerprint(selection, self._artifacts)

        totals = self._header(pool_moments.NAME)
        self._held: dict[str, str] = json.loads(totals.get("shards", "{}"))
        basis = json.loads(self._header(subspace_basis.NAME).get("shards", "{}"))
        manifest = self._manifest()
        pool = set(storage.samples(selection.source, selection.image_root, selection.store).shard_keys())
        # Why a shard that has left the pool is still needed.
        self._still_needed = {
            **dict.fromkeys(manifest, "the manifest names it, until the next refresh"),
            **dict.fromkeys(self._held, "the pool's totals hold it, until the next refresh"),
            **dict.fromkeys(basis, "the basis holds it, until the next refresh"),
            **dict.fromkeys(
                known_shards(instance, selection.name), "no refresh has seen yet that it left the pool"
            ),
        }
        self._shards = {shard: encode_name(shard) for shard in {*pool, *self._still_needed}}
        self._in_force = set(self._shards.values())
        self._left = {
            encode_name(shard): why for shard, why in self._still_needed.items() if shard not in pool
        }

        # Which versions of which tables are needed, and the names of shards whose receipt does not tell.
        self._needed: dict[str, set[int]] = defaultdict(set)
        self._untold: set[str] = set()
        for shard_lineage in (*basis.values(), *manifest.values()):
            self._needed[shard_lineage["lance_table"]].add(int(shard_lineage["lance_version"]))
        self._read_receipts()

        self._seen = self._read_notes()
        self._notes: dict[str, float] = {}

    def found(self) -> Iterator[_Found]:
        """Everything that may be unneeded, in the order in which it has to be removed."""
        yield from self._unfinished_files()
        yield from self._unfinished_search()
        yield from self._set_aside()
        yield from self._retired_moments()
        yield from self._gone_shards()
        yield from self._tables_of_shards()
        yield from self._lock_files()

    def write_notes(self) -> None:
        """Remember since when things are known to be unneeded."""
        if self._notes != self._seen:
            self._artifacts.write_json(NAME, self._notes)

    # What is needed

    def _header(self, asset: str) -> dict[str, str]:
        try:
            return self._artifacts.read_header(asset, suffix=".safetensors")
        except ArtifactMissingError:
            return {}

    def _manifest(self) -> dict[str, Any]:
        try:
            shards: dict[str, Any] = training_dataset.read_manifest(self._artifacts)["shards"]
        except ArtifactMissingError:
            return {}
        return shards

    def _read_receipts(self) -> None:
        # By file, since shards that have left the pool have receipts, too.
        for path in self._artifacts.paths(attention_embeddings.NAME, suffix=".json"):
            try:
                table = json.loads(path.read_bytes())["table"]
                self._needed[table["table"]].add(int(table["version"]))
            except (ValueError, KeyError, TypeError):
                self._untold.add(path.stem)

    def _read_notes(self) -> dict[str, float]:
        # Without them everything is seen for the first time, and stays longer.
        try:
            notes: dict[str, float] = self._artifacts.read_json(NAME, shape=dict[str, float])
        except (ArtifactMissingError, ArtifactCorruptError):
            return {}
        return notes

    def _unneeded_since(self, what: str) -> float:
        """When a cleaning first found this unneeded: now, if none did."""
        self._notes[what] = min(self._seen.get(what, self._now), self._now)
        return self._notes[what]

    def _if_due(self, leftover: Leftover, since: float, remove: Callable[[], None]) -> _Found:
        """The leftover, to be removed if it has been unneeded for the retention time."""
        if self._is_due(since):
            return leftover, remove
        return _kept(leftover, _NOT_DUE)

    def _is_due(self, since: float) -> bool:
        return max(0.0, self._now - since) >= self._retention

    # Files

    def _unfinished_files(self) -> Iterator[_Found]:
        for folder in self._folders():
            for path in folder.iterdir():
                if _WRITING.fullmatch(path.name):
                    file = _File.at(path)
                    yield self._if_due(
                        self._leftover(Kind.UNFINISHED, file, "its writer is gone"),
                        file.changed,
                        partial(_unlink, [file]),
                    )

    def _unfinished_search(self) -> Iterator[_Found]:
        """Nobody searches while the store is held alone, so a search table is one whose search was killed."""
        if files := self._table_files.get(SEARCH_TABLE):
            leftover = Leftover(Kind.UNFINISHED, SEARCH_TABLE, _total(files), "its search was killed")
            yield self._if_due(leftover, _newest(files), partial(self._tables.drop, SEARCH_TABLE))

    def _set_aside(self) -> Iterator[_Found]:
        """Parts of shards that have left the pool, or that are committed."""
        files = list(map(_File.at, self._artifacts.paths(reuse.SET_ASIDE, suffix=".parquet")))
        shard_of = {
            encode_name(part): shard for shard in self._shards for part in reuse.parts(self._artifacts, shard)
        }
        by_shard: dict[str, list[_File]] = defaultdict(list)
        for file in files:
            if shard := shard_of.get(file.path.stem):
                by_shard[shard].append(file)
            else:
                leftover = self._leftover(Kind.SET_ASIDE, file, "its shard left the pool")
                yield self._if_due(leftover, file.changed, partial(_unlink, [file]))
        for shard, parts in by_shard.items():
            leftover = Leftover(
                Kind.SET_ASIDE, shard, _total(parts), "the shard's table is committed", len(parts)
            )
            receipt = self._artifacts.path(attention_embeddings.NAME, shard, suffix=".json")
            committed = _File.at(receipt).changed if receipt.exists() else None
            if committed is None or committed < max(file.changed for file in parts):
                yield _kept(leftover, "the shard's next embedding goes on from them")
            else:
                yield self._if_due(leftover, committed, partial(reuse.forget, self._artifacts, shard))

    def _retired_moments(self) -> Iterator[_Found]:
        held = {encode_name(pool_moments.retired_name(*one)) for one in self._held.items()}
        for path in self._artifacts.paths(pool_moments.RETIRED, suffix=".safetensors"):
            if path.stem not in held:
                file = _File.at(path)
                leftover = self._leftover(
                    Kind.RETIRED, file, "the pool's totals, which held them, do no longer"
                )
                yield self._if_due(leftover, file.changed, partial(_unlink, [file]))

    def _lock_files(self) -> Iterator[_Found]:
        """Nobody waits at them while the store is held alone; who comes makes them anew."""
        assets = [*ASSET_MODULES, ""]
        works = {f"{asset}/{shard}".lstrip("/") for asset in assets for shard in self._shards}
        in_force = {f"writing-{encode_name(work)}.lock" for work in works.union(ASSET_MODULES)}
        for path in sorted(self._locks.glob("writing-*.lock")):
            if path.name not in in_force:
                name = f"{self._locks.name}/{path.name}"
                leftover = Leftover(Kind.LOCKS, name, path.stat().st_size, "its shard left the pool")
                since = max(path.stat().st_mtime, self._unneeded_since(f"lock {path.name}"))
                yield self._if_due(leftover, since, partial(path.unlink, missing_ok=True))

    # Shards that left the pool, and tables

    @cached_property
    def _table_files(self) -> dict[str, list[_File]]:
        """The files of each table."""
        return {
            name: [
                _File.at(path)
                for path in (self._embeddings.folder / f"{name}.lance").rglob("*")
                if path.is_file()
            ]
            for name in sorted(self._embeddings.table_names())
        }

    @cached_property
    def _tables_of(self) -> dict[str, list[str]]:
        """The tables of each shard, by the shard's name in file names."""
        tables: dict[str, list[str]] = defaultdict(list)
        for name in self._table_files:
            tables[_shard_part(name)].append(name)
        return tables

    def _gone_shards(self) -> Iterator[_Found]:
        outputs = self._outputs()
        for stem in sorted(outputs.keys() | self._tables_of.keys()):
            if not stem or (stem in self._in_force and stem not in self._left):
                continue
            files, tables = outputs.get(stem, []), self._tables_of.get(stem, [])
            everything = [*files, *(file for table in tables for file in self._table_files[table])]
            leftover = Leftover(Kind.GONE_SHARDS, _told(stem), _total(everything), "it left the pool")
            if why := self._left.get(stem):
                yield _kept(leftover, why)
            else:
                since = max(_newest(everything), self._unneeded_since(f"shard {stem}"))
                yield self._if_due(leftover, since, partial(self._remove_shard, files, tables))

    def _outputs(self) -> dict[str, list[_File]]:
        """The files of each shard, by its name in file names, the receipt first."""
        names = [folder.name for folder in self._folders()]
        indexes = [name for name in names if name.startswith(raw_samples.SHARD_INDEXES)]
        outputs: dict[str, list[_File]] = defaultdict(list)
        for asset, suffix in (*_OUTPUTS, *((index, ".json") for index in indexes)):
            for path in self._artifacts.paths(asset, suffix=suffix):
                outputs[path.stem].append(_File.at(path))
        return outputs

    def _remove_shard(self, files: Sequence[_File], tables: Iterable[str]) -> None:
        _unlink(files)
        for table in tables:
            self._tables.drop(table)

    def _tables_of_shards(self) -> Iterator[_Found]:
        for name, files in self._table_files.items():
            shard = _shard_part(name)
            if shard not in self._in_force:
                continue  # goes or stays with its shard, or is not one of ours
            if name in self._needed:
                yield from self._inside(name, files)
            else:
                yield self._unnamed(name, shard, files)

    def _unnamed(self, name: str, shard: str, files: Sequence[_File]) -> _Found:
        """A table that no receipt names, of a shard in the pool."""
        leftover = Leftover(Kind.OTHER_MODELS, name, _total(files), "no receipt names it")
        if shard in self._untold:
            return _kept(leftover, "its shard's receipt cannot be read; the next refresh replaces that")
        if self._present is None:
            return _kept(leftover, "the declared model is not known before its first refresh")
        if name.startswith(f"{self._present}--"):
            return _kept(leftover, "of the declared model, to be replaced by the next refresh")
        since = max(_newest(files), self._unneeded_since(f"table {name}"))
        return self._if_due(leftover, since, partial(self._tables.drop, name))

    def _inside(self, name: str, files: Sequence[_File]) -> Iterator[_Found]:
        """What a needed table holds beside the versions that are needed."""
        for file in files:
            if file.path.name.startswith(".tmp"):  # LanceDB never removes its own
                leftover = self._leftover(Kind.UNFINISHED, file, "its writer is gone")
                yield self._if_due(leftover, file.changed, partial(_unlink, [file]))
        whole = Leftover(Kind.OLD_VERSIONS, name, 0, "")
        try:
            versions = self._tables.versions(name)
        except (ValueError, RuntimeError, OSError) as error:
            yield _kept(whole, f"the table cannot be read ({error}); run a refresh")
            return
        yield from self._old_versions(name, versions)
        data = [file for file in files if file.path.parent.name == "data" and file.path.suffix == ".lance"]
        if len(data) > sum(version.n_files for version in versions):
            n_bytes = _total(data) - sum(version.n_bytes for version in versions)
            leftover = Leftover(Kind.UNFINISHED, name, n_bytes, "its writer is gone")
            yield self._if_due(leftover, _newest(files), partial(self._tables.remove_uncommitted, name))

    def _old_versions(self, table: str, versions: Sequence["_Version"]) -> Iterator[_Found]:
        """Versions from before the oldest needed one, each unneeded since the next one was made."""
        needed = self._needed[table] & {version.number for version in versions}
        if not needed:
            yield _kept(_versions_of(table, versions), "the recorded version is gone; run a refresh")
            return
        if newer := [one for one in versions if one.number > min(needed) and one.number not in needed]:
            yield _kept(_versions_of(table, newer), "newer than a version that is needed")
        times_kept = [one.made for one in versions if one.number >= min(needed)]
        due: list[_Version] = []
        young: list[_Version] = []
        for one, other in pairwise(versions):
            if one.number < min(needed):
                (due if self._is_due(max(one.made, other.made)) else young).append(one)
        if young:
            yield _kept(_versions_of(table, young), _NOT_DUE)
            times_kept += [one.made for one in young]
        if due:
            last, leftover = max(one.made for one in due), _versions_of(table, due)
            if last + _APART_SECONDS > min(times_kept):
                yield _kept(leftover, "their times do not tell them from later ones")
            else:
                yield leftover, partial(self._tables.prune, table, last, sorted(needed))

    # Words and places

    def _folders(self) -> list[UPath]:
        """Where artifacts lie."""
        root = self._artifacts.root
        others = {self._embeddings.folder.name, "dagster", self._locks.name}
        listed = sorted(root.iterdir()) if root.exists() else []
        return [path for path in listed if path.is_dir() and path.name not in others]

    def _leftover(self, kind: Kind, file: _File, why: str) -> Leftover:
        return Leftover(kind, str(file.path.relative_to(self._artifacts.root)), file.n_bytes, why)


def _kept(leftover: Leftover, why: str) -> _Found:
    return replace(leftover, why=why), None


def _versions_of(table: str, versions: Sequence["_Version"]) -> Leftover:
    n_bytes = sum(version.n_bytes for version in versions)
    return Leftover(Kind.OLD_VERSIONS, table, n_bytes, "replaced by the version that counts", len(versions))


def _total(files: Iterable[_File]) -> int:
    return sum(file.n_bytes for file in files)


def _newest(files: Iterable[_File]) -> float:
    return max((file.changed for file in files), default=0.0)


def _unlink(files: Iterable[_File]) -> None:
    for file in files:
        file.path.unlink(missing_ok=True)


def _shard_part(table: str) -> str:
    """The shard's name in the name of its table; empty if the table is not one of ours."""
    return table.partition("--")[2]


def _told(stem: str) -> str:
    """A shard by its name in file names; long ones are cut there."""
    try:
        return decode_name(stem)
    except ValueError:
        return stem


def _present_fingerprint(selection: Selection, artifacts: ArtifactStore) -> str | None:
    """Of the declared model; none where the store does not know it, which only loading it would tell."""
    try:
        return str(artifacts.read_json(CARDS, model_signature(**selection.target))["fingerprint"])
    except (ArtifactMissingError, ArtifactCorruptError, KeyError, TypeError):
        return None


# LanceDB


class _TableRefusedError(RuntimeError):
    """LanceDB did not remove what it was to remove; the message says why."""


@dataclass(frozen=True, slots=True)
class _Version:
    number: int
    made: float
    n_bytes: int
    n_files: int


@dataclass(frozen=True)
class _Tables:
    """What cleaning asks of LanceDB."""

    store: EmbeddingStore

    @cached_property
    def _connection(self) -> Any:
        import lancedb

        return lancedb.connect(
            str(self.store.folder), storage_options=dict(self.store.storage_options) or None
        )

    def drop(self, table: str) -> None:
        """Remove a table, or what a killed removal left of it."""
        self._connection.drop_table(table, ignore_missing=True)

    def versions(self, table: str) -> list[_Version]:
        """The versions that there are, by number.

        Raises:
            ValueError: There is no such table, or nothing that can be opened.
            RuntimeError: It is damaged.
        """
        listed = self._connection.open_table(table).list_versions()
        versions = [
            _Version(
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
            _TableRefusedError: The table is damaged, or one of the needed versions would have gone, too,
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
        raise _TableRefusedError(f"LanceDB refused: {error}") from error


@contextmanager
def _pinned(handle: Any, versions: Sequence[int]) -> Iterator[None]:
    """Tag versions meanwhile, so that LanceDB refuses to remove them; tags of a killed cleaning go first."""
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
