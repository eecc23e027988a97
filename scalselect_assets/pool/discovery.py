"""Step 0: discovery of the pool's shards, and the report of them to Dagster."""

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.pool import raw_samples
from scalselect_assets.recording.data_versions import DATA_VERSION_TAG
from scalselect_assets.recording.records import Records
from scalselect_assets.resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.sample_source import SampleSource, ShardIndex
from scalselect_assets.resources.storage import StorageResource

SHARD_FILES = "shard_files"
SHARD_MANIFEST = "shard_manifest"


@dataclass(frozen=True, slots=True)
class Discovery:
    """The pool as it is now.

    Attributes:
        versions: Fingerprint of each shard: its file's bytes and its images' sizes and times.
        n_rows: Number of rows of each shard; ``None`` if the file cannot be read as rows.
        unsettled: Shards whose file or images are still being written. They count as neither new nor changed
            nor gone until that has ended.
        passed_over: Files that are no shards, by kind, with count and examples; see `PoolListing`.
        missing_images: The missing images of each shard that names any.
        n_images: Number of images that the shards name, counted per shard.
    """

    versions: Mapping[str, str]
    n_rows: Mapping[str, int | None]
    unsettled: tuple[str, ...] = ()
    passed_over: Mapping[str, Any] = field(default_factory=dict)
    missing_images: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    n_images: int = 0


def discover(
    source: SampleSource, artifacts: ArtifactStore, settle_seconds: float = 0.0, *, remember: bool = True
) -> Discovery:
    """Find the shards and their versions; unchanged files are not read again.

    Args:
        source: The pool.
        artifacts: The store, which keeps an index of every file that was read.
        settle_seconds: A shard that was modified more recently than this counts as still being written.
        remember: Whether the store may be written to.

    Raises:
        FileNotFoundError: The pool does not exist.
    """
    versions, n_rows, unsettled, missing, n_images = {}, {}, [], {}, 0
    listing = source.listing()
    for shard in source.shards_of(listing):
        try:
            if _is_being_written(source.changed_at(shard), settle_seconds):
                unsettled.append(shard)  # not read now, since it would have to be read again
                continue
            index = _current_index(source, artifacts, shard, remember=remember)
            state = source.shard_state(shard, index)
        except FileNotFoundError as error:
            if error.errno is None:
                raise  # the folder of all images is missing, not the shard
            continue  # the shard was removed after the folder was listed
        if _is_being_written(state.changed_at, settle_seconds):
            unsettled.append(shard)
            continue
        versions[shard] = state.fingerprint
        n_rows[shard] = index.n_rows
        n_images += len(index.images)
        if state.missing_images:
            missing[shard] = state.missing_images
    return Discovery(versions, n_rows, tuple(unsettled), listing.to_json(), missing, n_images)


def settled_discovery(source: SampleSource, artifacts: ArtifactStore, settle_seconds: float) -> Discovery:
    """Discover the shards; if some are still being written, wait once and discover them again.

    Raises:
        FileNotFoundError: The pool does not exist.
    """
    discovery = discover(source, artifacts, settle_seconds)
    if discovery.unsettled:
        time.sleep(settle_seconds)
        discovery = discover(source, artifacts, settle_seconds)
    return discovery


def _is_being_written(changed_at: float | None, settle_seconds: float) -> bool:
    # A time in the future comes from a wrong clock, not from a file that is being written.
    return changed_at is not None and 0 <= time.time() - changed_at < settle_seconds


def _current_index(
    source: SampleSource, artifacts: ArtifactStore, shard: str, *, remember: bool
) -> ShardIndex:
    # An index that is missing, damaged or of another layout is made again, since it only saves reading.
    with contextlib.suppress(ArtifactMissingError, ArtifactCorruptError, ValueError):
        known = ShardIndex.from_json(artifacts.read_json(raw_samples.SHARD_INDEX, shard))
        if source.is_current(shard, known):
            return known
    index = source.index_shard(shard)
    if remember:
        artifacts.write_json(raw_samples.SHARD_INDEX, index.to_json(), shard)
    return index


def report_discovery(
    selection: Selection, instance: dg.DagsterInstance, discovery: Discovery
) -> tuple[list[str], list[str]]:
    """Report added, changed and removed shards to Dagster; returns the added and the removed ones.

    Partitions come before events, so that nobody sees a set of shards without its partitions.
    """
    records = Records(instance)
    known = set(records.known_shards(selection.name))
    pool = set(discovery.versions) | (known & set(discovery.unsettled))
    added, removed = sorted(pool - known), sorted(known - pool)
    records.add_shards(selection.name, added)
    records.delete_shards(selection.name, removed)
    observed = records.latest_observed(selection.key(SHARD_FILES), discovery.versions)
    for shard, version in discovery.versions.items():
        if observed.get(shard) != version:
            records.report(
                dg.AssetObservation(
                    selection.key(SHARD_FILES), partition=shard, tags={DATA_VERSION_TAG: version}
                )
            )
    _report_manifest(selection, records, pool)
    return added, removed


def _report_manifest(selection: Selection, records: Records, pool: set[str]) -> None:
    """Report the set of shards as a whole, if it differs from the one that was reported last."""
    manifest_version = _manifest_version(pool)
    seen = records.latest_observation(selection.key(SHARD_MANIFEST))
    if seen is None or seen.tags.get(DATA_VERSION_TAG) != manifest_version:
        records.report(
            dg.AssetObservation(
                selection.key(SHARD_MANIFEST),
                tags={DATA_VERSION_TAG: manifest_version},
                metadata={"shards": len(pool)},
            )
        )


def _manifest_version(shards: Iterable[str]) -> str:
    """A version that changes when a shard comes or goes, and stays when one changes."""
    return digest(sorted(shards))


def source_assets(selection: Selection) -> list[dg.SourceAsset]:
    """The two source assets that stand for the pool; observing either one in the UI discovers the shards."""

    def discovered(context: dg.OpExecutionContext, storage: StorageResource) -> Discovery:
        artifacts = storage.artifacts(selection.store)
        source = selection.open_pool(storage)
        discovery = settled_discovery(source, artifacts, selection.settle_seconds)
        report_discovery(selection, context.instance, discovery)
        return discovery

    @dg.observable_source_asset(
        key=selection.key(SHARD_FILES),
        group_name=selection.name,
        partitions_def=selection.partitions,
        description="The pool's shard files; a shard's data version covers its file and its images.",
    )
    def shard_files(context: dg.OpExecutionContext, storage: StorageResource) -> dg.DataVersionsByPartition:
        return dg.DataVersionsByPartition(dict(discovered(context, storage).versions))

    @dg.observable_source_asset(
        key=selection.key(SHARD_MANIFEST),
        group_name=selection.name,
        description="The set of the pool's shards; the data version is a hash of their names.",
    )
    def shard_manifest(context: dg.OpExecutionContext, storage: StorageResource) -> dg.DataVersion:
        discovered(context, storage)
        return dg.DataVersion(_manifest_version(Records(context.instance).known_shards(selection.name)))

    return [shard_files, shard_manifest]
