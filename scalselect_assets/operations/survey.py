"""A survey of a store: the files and tables that nothing needs any more, with the reasons."""

import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import dagster as dg
from upath import UPath

from scalselect_assets.asset_path import all_assets
from scalselect_assets.dataset import training_manifest
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts, reuse
from scalselect_assets.operations.leftovers import (
    NAME,
    NOT_DUE,
    Found,
    Kind,
    Leftover,
    StoredFile,
    kept,
    newest,
    total,
    unlink,
)
from scalselect_assets.pool import raw_samples
from scalselect_assets.recording.records import Records
from scalselect_assets.resources.artifacts import (
    ARRAYS,
    FRAME,
    RECORD,
    ArtifactCorruptError,
    ArtifactMissingError,
    ArtifactStore,
)
from scalselect_assets.resources.files import is_local
from scalselect_assets.resources.names import decode_name, encode_name
from scalselect_assets.resources.search_table import SEARCH_TABLE
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.table_versions import TableVersion, TableVersions
from scalselect_assets.resources.vlm import CARDS, model_signature
from scalselect_assets.subspace import pool_moments
from scalselect_assets.subspace.basis_header import MomentsHeader, read_basis_header

_WRITING = re.compile(r"\.writing-[0-9a-f]{32}")  # as `ArtifactStore` names a file until it is complete
# Versions made closer together are left alone: LanceDB removes by time, and reads the clock itself.
_APART_SECONDS = 1.0


class Survey:
    """Lists the contents of a store and their users, while nobody else works on the store."""

    def __init__(
        self, selection: Selection, storage: StorageResource, instance: dg.DagsterInstance, retention: float
    ) -> None:
        self._artifacts = storage.artifacts(selection.store)
        if not is_local(self._artifacts.root):
            self._artifacts.root.fs.invalidate_cache()  # listings are kept for the life of a process
        self._embeddings = storage.embeddings(selection.store)
        self._tables = TableVersions(self._embeddings)
        self._locks = storage.locks(selection.store).folder
        self._now, self._retention = time.time(), retention
        self._present = _present_fingerprint(selection, self._artifacts)

        totals = self._header(pool_moments.NAME)
        self._held: dict[str, str] = json.loads(totals.get("shards", "{}"))
        basis = self._basis_shards()
        manifest = self._manifest()
        pool = set(selection.open_pool(storage).shard_keys())
        # The reasons why a shard that has left the pool is still needed.
        self._still_needed = {
            **dict.fromkeys(manifest, "the manifest names it, until the next refresh"),
            **dict.fromkeys(self._held, "the pool's totals hold it, until the next refresh"),
            **dict.fromkeys(basis, "the basis holds it, until the next refresh"),
            **dict.fromkeys(
                Records(instance).known_shards(selection.name),
                "no refresh has seen yet that it left the pool",
            ),
        }
        self._shards = {shard: encode_name(shard) for shard in {*pool, *self._still_needed}}
        self._in_force = set(self._shards.values())
        self._left = {
            encode_name(shard): why for shard, why in self._still_needed.items() if shard not in pool
        }

        # The needed versions of each table, and the shards whose receipt cannot be read.
        self._needed: dict[str, set[int]] = defaultdict(set)
        self._unreadable: set[str] = set()
        for moments in basis.values():
            self._needed[moments.lance_table].add(moments.lance_version)
        for shard_lineage in manifest.values():
            self._needed[shard_lineage["lance_table"]].add(int(shard_lineage["lance_version"]))
        self._read_receipts()

        self._seen = self._read_notes()
        self._notes: dict[str, float] = {}

    def found(self) -> Iterator[Found]:
        """Everything that may be unneeded, in the order in which it has to be removed."""
        yield from self._unfinished_files()
        yield from self._unfinished_search()
        yield from self._set_aside()
        yield from self._retired_moments()
        yield from self._gone_shards()
        yield from self._tables_of_shards()
        yield from self._lock_files()

    def write_notes(self) -> None:
        """Note in the store when each thing was first found unneeded."""
        if self._notes != self._seen:
            self._artifacts.write_json(NAME, self._notes)

    # What is needed

    def _header(self, asset: str) -> dict[str, str]:
        try:
            return self._artifacts.read_header(asset, suffix=ARRAYS)
        except ArtifactMissingError:
            return {}

    def _basis_shards(self) -> Mapping[str, MomentsHeader]:
        try:
            return read_basis_header(self._artifacts).shards
        except ArtifactMissingError:
            return {}

    def _manifest(self) -> dict[str, Any]:
        try:
            shards: dict[str, Any] = training_manifest.read_manifest(self._artifacts)["shards"]
        except ArtifactMissingError:
            return {}
        return shards

    def _read_receipts(self) -> None:
        # Shards that have left the pool have receipts, too, so the files are listed.
        for path in self._artifacts.paths(receipts.NAME, suffix=RECORD):
            try:
                table = json.loads(path.read_bytes())["table"]
                self._needed[table["table"]].add(int(table["version"]))
            except (ValueError, KeyError, TypeError):
                self._unreadable.add(path.stem)

    def _read_notes(self) -> dict[str, float]:
        # Without the notes, every thing counts as found for the first time, and stays longer.
        try:
            notes: dict[str, float] = self._artifacts.read_json(NAME, shape=dict[str, float])
        except (ArtifactMissingError, ArtifactCorruptError):
            return {}
        return notes

    def _unneeded_since(self, what: str) -> float:
        """The time when a cleaning first found this unneeded; now, if this cleaning is the first."""
        self._notes[what] = min(self._seen.get(what, self._now), self._now)
        return self._notes[what]

    def _if_due(self, leftover: Leftover, since: float, remove: Callable[[], None]) -> Found:
        """A leftover that is removed if it has been unneeded for the retention time."""
        if self._is_due(since):
            return leftover, remove
        return kept(leftover, NOT_DUE)

    def _is_due(self, since: float) -> bool:
        return max(0.0, self._now - since) >= self._retention

    # Files

    def _unfinished_files(self) -> Iterator[Found]:
        for folder in self._folders():
            for path in folder.iterdir():
                if _WRITING.fullmatch(path.name):
                    file = StoredFile.at(path)
                    yield self._if_due(
                        self._leftover(Kind.UNFINISHED, file, "its writer is gone"),
                        file.changed,
                        partial(unlink, [file]),
                    )

    def _unfinished_search(self) -> Iterator[Found]:
        """Search tables of killed searches, since nobody can search while a cleaning holds the store."""
        if files := self._table_files.get(SEARCH_TABLE):
            leftover = Leftover(Kind.UNFINISHED, SEARCH_TABLE, total(files), "its search was killed")
            yield self._if_due(leftover, newest(files), partial(self._tables.drop, SEARCH_TABLE))

    def _set_aside(self) -> Iterator[Found]:
        """Vectors that were set aside, of shards that have left the pool or are committed."""
        files = list(map(StoredFile.at, self._artifacts.paths(reuse.SET_ASIDE, suffix=FRAME)))
        shard_of = {
            encode_name(part): shard for shard in self._shards for part in reuse.parts(self._artifacts, shard)
        }
        by_shard: dict[str, list[StoredFile]] = defaultdict(list)
        for file in files:
            if shard := shard_of.get(file.path.stem):
                by_shard[shard].append(file)
            else:
                leftover = self._leftover(Kind.SET_ASIDE, file, "its shard left the pool")
                yield self._if_due(leftover, file.changed, partial(unlink, [file]))
        for shard, parts in by_shard.items():
            leftover = Leftover(
                Kind.SET_ASIDE, shard, total(parts), "the shard's table is committed", len(parts)
            )
            receipt = self._artifacts.path(receipts.NAME, shard, suffix=RECORD)
            committed = StoredFile.at(receipt).changed if receipt.exists() else None
            if committed is None or committed < max(file.changed for file in parts):
                yield kept(leftover, "the shard's next embedding goes on from them")
            else:
                yield self._if_due(leftover, committed, partial(reuse.forget, self._artifacts, shard))

    def _retired_moments(self) -> Iterator[Found]:
        held = {encode_name(pool_moments.retired_name(*one)) for one in self._held.items()}
        for path in self._artifacts.paths(pool_moments.RETIRED, suffix=ARRAYS):
            if path.stem not in held:
                file = StoredFile.at(path)
                leftover = self._leftover(
                    Kind.RETIRED, file, "the pool's totals, which held them, do no longer"
                )
                yield self._if_due(leftover, file.changed, partial(unlink, [file]))

    def _lock_files(self) -> Iterator[Found]:
        """Lock files of shards that left the pool.

        Nobody waits for these locks while a cleaning holds the store, and a later writer makes them again.
        """
        assets = [*(asset.name for asset in all_assets()), ""]
        works = {f"{asset}/{shard}".lstrip("/") for asset in assets for shard in self._shards}
        in_force = {f"writing-{encode_name(work)}.lock" for work in works.union(assets)}
        for path in sorted(self._locks.glob("writing-*.lock")):
            if path.name not in in_force:
                name = f"{self._locks.name}/{path.name}"
                leftover = Leftover(Kind.LOCKS, name, path.stat().st_size, "its shard left the pool")
                since = max(path.stat().st_mtime, self._unneeded_since(f"lock {path.name}"))
                yield self._if_due(leftover, since, partial(path.unlink, missing_ok=True))

    # Shards that left the pool, and tables

    @cached_property
    def _table_files(self) -> dict[str, list[StoredFile]]:
        """The files of each table."""
        return {
            name: [
                StoredFile.at(path)
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

    def _gone_shards(self) -> Iterator[Found]:
        outputs = self._outputs()
        for stem in sorted(outputs.keys() | self._tables_of.keys()):
            if not stem or (stem in self._in_force and stem not in self._left):
                continue
            files, tables = outputs.get(stem, []), self._tables_of.get(stem, [])
            everything = [*files, *(file for table in tables for file in self._table_files[table])]
            leftover = Leftover(Kind.GONE_SHARDS, shard_of_stem(stem), total(everything), "it left the pool")
            if why := self._left.get(stem):
                yield kept(leftover, why)
            else:
                since = max(newest(everything), self._unneeded_since(f"shard {stem}"))
                yield self._if_due(leftover, since, partial(self._remove_shard, files, tables))

    def _outputs(self) -> dict[str, list[StoredFile]]:
        """The files of each shard, by its name in file names, in the order in which they are to be removed.

        Later assets of the path refer to earlier ones, so they go first.
        """
        names = [folder.name for folder in self._folders()]
        indexes = [name for name in names if name.startswith(raw_samples.SHARD_INDEXES)]
        outputs: dict[str, list[StoredFile]] = defaultdict(list)
        kept = [files for asset in reversed(all_assets()) for files in asset.shard_files]
        for asset, suffix in (*kept, *((index, RECORD) for index in indexes)):
            for path in self._artifacts.paths(asset, suffix=suffix):
                outputs[path.stem].append(StoredFile.at(path))
        return outputs

    def _remove_shard(self, files: Sequence[StoredFile], tables: Iterable[str]) -> None:
        unlink(files)
        for table in tables:
            self._tables.drop(table)

    def _tables_of_shards(self) -> Iterator[Found]:
        for name, files in self._table_files.items():
            shard = _shard_part(name)
            if shard not in self._in_force:
                continue  # it is removed or kept with its shard, or is not a table of this project
            if name in self._needed:
                yield from self._inside(name, files)
            else:
                yield self._unnamed(name, shard, files)

    def _unnamed(self, name: str, shard: str, files: Sequence[StoredFile]) -> Found:
        """A table that no receipt names, of a shard in the pool."""
        leftover = Leftover(Kind.OTHER_MODELS, name, total(files), "no receipt names it")
        if shard in self._unreadable:
            return kept(leftover, "its shard's receipt cannot be read; the next refresh replaces that")
        if self._present is None:
            return kept(leftover, "the declared model is not known before its first refresh")
        if name.startswith(f"{self._present}--"):
            return kept(leftover, "of the declared model, to be replaced by the next refresh")
        since = max(newest(files), self._unneeded_since(f"table {name}"))
        return self._if_due(leftover, since, partial(self._tables.drop, name))

    def _inside(self, name: str, files: Sequence[StoredFile]) -> Iterator[Found]:
        """The leftovers inside a needed table: unfinished files and versions that nobody needs."""
        for file in files:
            if file.path.name.startswith(".tmp"):  # LanceDB never removes its own
                leftover = self._leftover(Kind.UNFINISHED, file, "its writer is gone")
                yield self._if_due(leftover, file.changed, partial(unlink, [file]))
        whole = Leftover(Kind.OLD_VERSIONS, name, 0, "")
        try:
            versions = self._tables.versions(name)
        except (ValueError, RuntimeError, OSError) as error:
            yield kept(whole, f"the table cannot be read ({error}); run a refresh")
            return
        yield from self._old_versions(name, versions)
        data = [file for file in files if file.path.parent.name == "data" and file.path.suffix == ".lance"]
        if len(data) > sum(version.n_files for version in versions):
            n_bytes = total(data) - sum(version.n_bytes for version in versions)
            leftover = Leftover(Kind.UNFINISHED, name, n_bytes, "its writer is gone")
            yield self._if_due(leftover, newest(files), partial(self._tables.remove_uncommitted, name))

    def _old_versions(self, table: str, versions: Sequence["TableVersion"]) -> Iterator[Found]:
        """Versions older than the oldest needed one; each is unneeded since the next one was made."""
        needed = self._needed[table] & {version.number for version in versions}
        if not needed:
            yield kept(_versions_of(table, versions), "the recorded version is gone; run a refresh")
            return
        if newer := [one for one in versions if one.number > min(needed) and one.number not in needed]:
            yield kept(_versions_of(table, newer), "newer than a version that is needed")
        times_kept = [one.made for one in versions if one.number >= min(needed)]
        due: list[TableVersion] = []
        young: list[TableVersion] = []
        for one, other in pairwise(versions):
            if one.number < min(needed):
                (due if self._is_due(max(one.made, other.made)) else young).append(one)
        if young:
            yield kept(_versions_of(table, young), NOT_DUE)
            times_kept += [one.made for one in young]
        if due:
            last, leftover = max(one.made for one in due), _versions_of(table, due)
            if last + _APART_SECONDS > min(times_kept):
                yield kept(leftover, "they were made too close in time to later ones")
            else:
                yield leftover, partial(self._tables.prune, table, last, sorted(needed))

    # Folders and names

    def _folders(self) -> list[UPath]:
        """The folders that hold artifacts."""
        root = self._artifacts.root
        others = {self._embeddings.folder.name, "dagster", self._locks.name}
        listed = sorted(root.iterdir()) if root.exists() else []
        return [path for path in listed if path.is_dir() and path.name not in others]

    def _leftover(self, kind: Kind, file: StoredFile, why: str) -> Leftover:
        return Leftover(kind, str(file.path.relative_to(self._artifacts.root)), file.n_bytes, why)


def _versions_of(table: str, versions: Sequence["TableVersion"]) -> Leftover:
    n_bytes = sum(version.n_bytes for version in versions)
    return Leftover(Kind.OLD_VERSIONS, table, n_bytes, "replaced by the version that counts", len(versions))


def _shard_part(table: str) -> str:
    """The shard's name in the name of its table; empty if it is not a table of this project."""
    return table.partition("--")[2]


def shard_of_stem(stem: str) -> str:
    """The shard with a given name in file names; long names are cut there."""
    try:
        return decode_name(stem)
    except ValueError:
        return stem


def _present_fingerprint(selection: Selection, artifacts: ArtifactStore) -> str | None:
    """The fingerprint of the declared model; None if the store has no card of it yet."""
    try:
        return str(artifacts.read_json(CARDS, model_signature(**selection.target))["fingerprint"])
    except (ArtifactMissingError, ArtifactCorruptError, KeyError, TypeError):
        return None
