"""Step 0: discovery of the pool's shards, and reporting them to Dagster."""

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import dagster as dg

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.method.interrupts import deferred
from scalselect_assets.pool import raw_samples
from scalselect_assets.recording.data_versions import DATA_VERSION_TAG
from scalselect_assets.recording.partitions import known_shards, shards_name
from scalselect_assets.recording.records import latest_versions
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
        versions: Content fingerprint by shard: its file's bytes and its images' sizes and times.
        n_rows: Rows by shard; ``None`` where the file cannot be read as rows.
        unsettled: Shards whose file or images are still being written. They are neither new nor changed nor
            gone until that has ended.
        missing_images: The images that are not there, of each shard that names such.
        n_images: How many images the shards name, counted in each of them.
    """

    versions: Mapping[str, str]
    n_rows: Mapping[str, int | None]
    unsettled: tuple[str, ...] = ()
    missing_images: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    n_images: int = 0


def discover(
    source: SampleSource, artifacts: ArtifactStore, settle_seconds: float = 0.0, *, remember: bool = True
) -> Discovery:
    """Find the shards and their versions; unchanged files are not read again.

    Args:
        source: The pool.
        artifacts: The store, which remembers what was read.
        settle_seconds: A shard that was modified more recently is taken to be still being written.
        remember: Whether the store may be written to.

    Raises:
        FileNotFoundError: The pool does not exist.
    """
    versions, n_rows, unsettled, missing, n_images = {}, {}, [], {}, 0
    for shard in source.shard_keys():
        try:
            if _is_being_written(source.changed_at(shard), settle_seconds):
                unsettled.append(shard)  # and not read, since it would have to be read again
                continue
            index = _current_index(source, artifacts, shard, remember=remember)
            state = source.shard_state(shard, index)
        except FileNotFoundError as error:
            if error.errno is None:
                raise  # not the shard, but the folder that all images are in
            continue  # it went after the folder was listed
        if _is_being_written(state.changed_at, settle_seconds):
            unsettled.append(shard)
            continue
        versions[shard] = state.fingerprint
        n_rows[shard] = index.n_rows
        n_images += len(index.images)
        if state.missing_images:
            missing[shard] = state.missing_images
    return Discovery(versions, n_rows, tuple(unsettled), missing, n_images)


def settled_discovery(source: SampleSource, artifacts: ArtifactStore, settle_seconds: float) -> Discovery:
    """``discover``, waiting once for what has just been written; raises likewise."""
    discovery = discover(source, artifacts, settle_seconds)
    if discovery.unsettled:
        time.sleep(settle_seconds)
        discovery = discover(source, artifacts, settle_seconds)
    return discovery


def _is_being_written(changed_at: float | None, settle_seconds: float) -> bool:
    # A time in the future is a clock that was wrong, not a file that will be written.
    return changed_at is not None and 0 <= time.time() - changed_at < settle_seconds


def _current_index(
    source: SampleSource, artifacts: ArtifactStore, shard: str, *, remember: bool
) -> ShardIndex:
    # An index that is missing, damaged or of another layout is made again; it is only a memory.
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
    """Tell Dagster of added, changed and removed shards; returns the added and the removed ones.

    Partitions come before events, so that nobody sees a set of shards without its partitions.
    """
    partitions = shards_name(selection.name)
    with deferred():
        known = set(known_shards(instance, selection.name))
        pool = set(discovery.versions) | (known & set(discovery.unsettled))
        added, removed = sorted(pool - known), sorted(known - pool)
        if added:
            instance.add_dynamic_partitions(partitions, added)
        for shard in removed:
            instance.delete_dynamic_partition(partitions, shard)
    observed = latest_versions(
        instance,
        selection.key(SHARD_FILES),
        dg.DagsterEventType.ASSET_OBSERVATION,
        set(discovery.versions),
    )
    for shard, version in discovery.versions.items():
        if observed.get(shard, {}).get("data_version") != version:
            observation = dg.AssetObservation(
                selection.key(SHARD_FILES), partition=shard, tags={DATA_VERSION_TAG: version}
            )
            with deferred():  # one by one, since ten thousand take minutes
                instance.report_runless_asset_event(observation)
    _report_manifest(selection, instance, pool)
    return added, removed


@deferred()
def _report_manifest(selection: Selection, instance: dg.DagsterInstance, pool: set[str]) -> None:
    manifest_version = _manifest_version(pool)
    manifest = instance.fetch_observations(selection.key(SHARD_MANIFEST), limit=1).records
    seen = manifest[0].asset_observation if manifest else None
    if seen is None or seen.tags.get(DATA_VERSION_TAG) != manifest_version:
        instance.report_runless_asset_event(
            dg.AssetObservation(
                selection.key(SHARD_MANIFEST),
                tags={DATA_VERSION_TAG: manifest_version},
                metadata={"shards": len(pool)},
            )
        )


def _manifest_version(shards: Iterable[str]) -> str:
    """Changes when a shard comes or goes, not when one changes."""
    return digest(sorted(shards))


def source_assets(selection: Selection) -> list[dg.SourceAsset]:
    """The pool as Dagster sees it; observing either discovers the shards, from the UI too."""

    def discovered(context: dg.OpExecutionContext, storage: StorageResource) -> Discovery:
        artifacts = storage.artifacts(selection.store)
        source = storage.samples(selection.source, selection.image_root, selection.store)
        discovery = settled_discovery(source, artifacts, selection.settle_seconds)
        report_discovery(selection, context.instance, discovery)
        return discovery

    @dg.observable_source_asset(
        key=selection.key(SHARD_FILES),
        group_name=selection.name,
        partitions_def=selection.partitions,
        description="The pool's shard files; the data version is the content of each with its images.",
    )
    def shard_files(context: dg.OpExecutionContext, storage: StorageResource) -> dg.DataVersionsByPartition:
        return dg.DataVersionsByPartition(dict(discovered(context, storage).versions))

    @dg.observable_source_asset(
        key=selection.key(SHARD_MANIFEST),
        group_name=selection.name,
        description="Which shards the pool has; the data version is the set of their names.",
    )
    def shard_manifest(context: dg.OpExecutionContext, storage: StorageResource) -> dg.DataVersion:
        discovered(context, storage)
        return dg.DataVersion(_manifest_version(known_shards(context.instance, selection.name)))

    return [shard_files, shard_manifest]
