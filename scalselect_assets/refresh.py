"""Discovery, and materializing exactly what is stale: one process, the model loaded once.

`Refresh.run` is what `scalselect run` calls and what the ``<selection>_refresh`` job wraps. It finds the
shards, reports their versions to Dagster, compares the provenance that each asset would have now with the
recorded one, and runs what differs, as ordinary Dagster runs. Nothing stale means no run. It can be killed at
any point: the next call continues from what was committed. One refresh at a time per store, by a file lock.

Costs without work: one stat per shard file and per image, one event-log query per asset.
"""

import contextlib
import fcntl
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import dagster as dg

from resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from resources.embedding_store import table_name
from resources.identity import digest
from resources.image_root import is_local
from resources.progress import Progress
from resources.sample_source import SampleSource, ShardIndex
from resources.storage import StorageResource
from resources.vlm import VlmResource
from scalselect_assets import (
    attention_embeddings,
    embedding_moments,
    importance_scores,
    raw_samples,
    selected_subset,
    subspace_basis,
    training_dataset,
)
from scalselect_assets.lineage import DATA_VERSION_TAG, MODEL_TAG, PROVENANCE_TAG
from scalselect_assets.selection import Selection

SHARD_FILES = "shard_files"
SHARD_MANIFEST = "shard_manifest"
REFRESH_TAG = "scalselect/refresh"
_SHARD_INDEX = f"shard_index-{raw_samples.CODE_VERSION}"  # it knows images as that code reads rows
_RECORDS_PER_QUERY = 1000  # Dagster's own limit
_SHARD_ASSETS = (raw_samples.NAME, attention_embeddings.NAME, embedding_moments.NAME)


class RefreshError(RuntimeError):
    """The refresh cannot go on; the message says what to do."""


class RefreshBusyError(RefreshError):
    """Another refresh works on the same store."""


@dataclass(frozen=True, slots=True)
class Discovery:
    """The pool as it is now.

    Attributes:
        versions: Content fingerprint by shard: its file's bytes and its images' sizes and times.
        n_rows: Rows by shard; ``None`` where the file cannot be read as rows.
    """

    versions: Mapping[str, str]
    n_rows: Mapping[str, int | None]

    @property
    def manifest_version(self) -> str:
        """Changes when a shard comes or goes, not when one changes."""
        return digest(sorted(self.versions))


@dataclass(slots=True)
class RefreshReport:
    """What one refresh did.

    Attributes:
        added: Shards new to Dagster.
        removed: Shards that are gone from the pool.
        embedded: Shards whose vectors were computed.
        failed: Message by shard for those that could not be materialized.
        runs: Dagster runs that were made, in order: assets and shards.
    """

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    embedded: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)


def discover(source: SampleSource, artifacts: ArtifactStore) -> Discovery:
    """Find the shards and their versions; unchanged files are not read again.

    Raises:
        FileNotFoundError: The pool does not exist.
    """
    versions, n_rows = {}, {}
    for shard in source.shard_keys():
        index = _current_index(source, artifacts, shard)
        versions[shard] = source.shard_fingerprint(shard, index)
        n_rows[shard] = index.n_rows
    return Discovery(versions, n_rows)


def _current_index(source: SampleSource, artifacts: ArtifactStore, shard: str) -> ShardIndex:
    # An index that is missing, damaged or of another layout is made again; it is only a memory.
    with contextlib.suppress(ArtifactMissingError, ArtifactCorruptError, ValueError):
        known = ShardIndex.from_json(artifacts.read_json(_SHARD_INDEX, shard))
        if source.is_current(shard, known):
            return known
    index = source.index_shard(shard)
    artifacts.write_json(_SHARD_INDEX, index.to_json(), shard)
    return index


def report_discovery(
    selection: Selection, instance: dg.DagsterInstance, discovery: Discovery
) -> tuple[list[str], list[str]]:
    """Tell Dagster of added, changed and removed shards; returns the added and the removed ones."""
    partitions = f"{selection.name}_shards"
    known = set(instance.get_dynamic_partitions(partitions))
    added = sorted(set(discovery.versions) - known)
    removed = sorted(known - set(discovery.versions))
    if added:
        instance.add_dynamic_partitions(partitions, added)
    for shard in removed:
        instance.delete_dynamic_partition(partitions, shard)
    observed = _latest_tags(instance, selection.key(SHARD_FILES), dg.DagsterEventType.ASSET_OBSERVATION)
    for shard, version in discovery.versions.items():
        if observed.get(shard, {}).get(DATA_VERSION_TAG) != version:
            instance.report_runless_asset_event(
                dg.AssetObservation(
                    selection.key(SHARD_FILES), partition=shard, tags={DATA_VERSION_TAG: version}
                )
            )
    manifest = instance.fetch_observations(selection.key(SHARD_MANIFEST), limit=1).records
    seen = manifest[0].asset_observation if manifest else None
    if seen is None or seen.tags.get(DATA_VERSION_TAG) != discovery.manifest_version:
        instance.report_runless_asset_event(
            dg.AssetObservation(
                selection.key(SHARD_MANIFEST),
                tags={DATA_VERSION_TAG: discovery.manifest_version},
                metadata={"shards": len(discovery.versions)},
            )
        )
    return added, removed


def source_assets(selection: Selection) -> list[dg.SourceAsset]:
    """The pool as Dagster sees it; observing either discovers the shards, from the UI too."""

    def discovered(context: dg.OpExecutionContext, storage: StorageResource) -> Discovery:
        artifacts = storage.artifacts(selection.store)
        source = storage.samples(selection.source, selection.image_root, selection.store)
        discovery = discover(source, artifacts)
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
        return dg.DataVersion(discovered(context, storage).manifest_version)

    return [shard_files, shard_manifest]


def refresh_job(selection: Selection) -> dg.JobDefinition:
    """The refresh as a job, for the UI and for schedules."""

    @dg.op(name=selection.job_name("refresh_op"), description="Materialize exactly what is stale.")
    def refresh_op(
        context: dg.OpExecutionContext,
        storage: StorageResource,
        vlm: VlmResource,
        progress: dg.ResourceParam[Progress],
    ) -> None:
        def stopped() -> bool:
            run = context.instance.get_run_by_id(context.run_id)
            return run is not None and run.status in {
                dg.DagsterRunStatus.CANCELING,
                dg.DagsterRunStatus.CANCELED,
            }

        report = Refresh(
            selection,
            job=context.repository_def.get_job(selection.job_name("assets")),
            instance=context.instance,
            storage=storage,
            vlm=vlm,
            progress=progress,
            log=context.log,
            should_stop=stopped,
        ).run()
        context.log.info(
            f"{len(report.runs)} runs, {len(report.embedded)} shards embedded, {len(report.failed)} failed"
        )
        if report.failed:
            raise dg.Failure(
                "\n".join(f"{shard}: {message}" for shard, message in report.failed.items()),
                allow_retries=False,
            )

    @dg.job(
        name=selection.job_name("refresh"),
        executor_def=dg.in_process_executor,
        description="Find new, changed and removed shards and materialize exactly what is stale.",
    )
    def refresh() -> None:
        refresh_op()

    return refresh


class Refresh:
    """One refresh of one selection."""

    def __init__(
        self,
        selection: Selection,
        *,
        job: dg.JobDefinition,
        instance: dg.DagsterInstance,
        storage: StorageResource,
        vlm: VlmResource,
        progress: Progress,
        log: logging.Logger,
        log_level: str = "INFO",
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Prepare a refresh.

        Args:
            selection: What to refresh.
            job: The selection's asset job, with its resources.
            instance: Where runs and versions are recorded.
            storage: Opens pool and store.
            vlm: Loads the target model.
            progress: Told of the embedding work.
            log: For what the refresh itself has to say.
            log_level: Of the runs' console output.
            should_stop: Asked before every run.
        """
        self._selection, self._job, self._instance = selection, job, instance
        self._storage, self._vlm, self._progress, self._log = storage, vlm, progress, log
        self._run_config = {"loggers": {"console": {"config": {"log_level": log_level}}}}
        self._should_stop = should_stop
        self._artifacts = storage.artifacts(selection.store)
        self._source = storage.samples(selection.source, selection.image_root, selection.store)
        self._report = RefreshReport()

    def run(self) -> RefreshReport:
        """Bring every asset of the selection up to date.

        Raises:
            RefreshBusyError: Another refresh holds the store.
            RefreshError: The pool has no shards, or an asset over all shards failed.
            FileNotFoundError: The pool does not exist.
        """
        with _exclusive(self._storage, self._selection.store):
            self._close_interrupted_runs()
            discovery = discover(self._source, self._artifacts)
            if not discovery.versions:
                raise RefreshError(
                    f"no shard files (*.json, *.jsonl, *.ndjson) in {self._selection.source}; a shard is a "
                    "JSON array or JSON Lines file of samples"
                )
            self._report.added, self._report.removed = report_discovery(
                self._selection, self._instance, discovery
            )
            self._refresh_shards(discovery)
            self._refresh_whole()
            return self._report

    def stale_shards(self, discovery: Discovery) -> list[str]:
        """The shards with anything to compute before the basis; changes nothing."""
        recorded = self._recorded_shards()
        tables = self._storage.embeddings(self._selection.store).table_names()
        return [
            shard
            for shard, version in discovery.versions.items()
            if self._stale_assets(shard, version, recorded, tables)
        ]

    # Shards

    def _refresh_shards(self, discovery: Discovery) -> None:
        recorded = self._recorded_shards()
        tables = self._storage.embeddings(self._selection.store).table_names()
        stale = {
            shard: assets
            for shard, version in discovery.versions.items()
            if (assets := self._stale_assets(shard, version, recorded, tables))
        }
        embedding = [shard for shard, assets in stale.items() if attention_embeddings.NAME in assets]
        self._progress.planned(len(embedding), sum(discovery.n_rows[shard] or 0 for shard in embedding))
        for shard, assets in stale.items():
            if assets[0] == raw_samples.NAME and recorded[attention_embeddings.NAME].get(shard):
                # The rows may turn out as they were, and then their vectors stand.
                if not self._materialize_shard([raw_samples.NAME], shard):
                    continue
                recorded = self._recorded_shards([shard], recorded)
                assets = self._stale_assets(shard, discovery.versions[shard], recorded, tables)  # noqa: PLW2901
            if assets and self._materialize_shard(assets, shard) and attention_embeddings.NAME in assets:
                self._report.embedded.append(shard)

    def _stale_assets(
        self,
        shard: str,
        shard_version: str,
        recorded: Mapping[str, Mapping[str, Mapping[str, str]]],
        tables: set[str],
    ) -> list[str]:
        """The shard's assets that must run, in order: the first stale one and all after it."""
        fingerprint = self._fingerprint
        versions = {asset: recorded[asset].get(shard, {}) for asset in _SHARD_ASSETS}

        def version(asset: str) -> str:
            return versions[asset].get(DATA_VERSION_TAG, "")

        expected = {
            raw_samples.NAME: raw_samples.provenance(self._selection, shard_version),
            attention_embeddings.NAME: attention_embeddings.provenance(
                self._selection, fingerprint, version(raw_samples.NAME)
            ),
            embedding_moments.NAME: embedding_moments.provenance(
                self._selection, version(attention_embeddings.NAME)
            ),
        }
        present = {
            raw_samples.NAME: self._artifacts.exists(raw_samples.NAME, shard, suffix=".parquet"),
            attention_embeddings.NAME: table_name(fingerprint, shard) in tables
            and self._artifacts.exists(attention_embeddings.NAME, shard, suffix=".json")
            and self._artifacts.exists(attention_embeddings.REJECTED, shard, suffix=".parquet"),
            embedding_moments.NAME: self._artifacts.exists(
                embedding_moments.NAME, shard, suffix=".safetensors"
            ),
        }
        for position, asset in enumerate(_SHARD_ASSETS):
            if versions[asset].get(PROVENANCE_TAG) != expected[asset] or not present[asset]:
                return list(_SHARD_ASSETS[position:])
        return []

    @property
    def _fingerprint(self) -> str:
        return str(self._vlm.card(self._artifacts, **self._selection.target)["fingerprint"])

    def _recorded_shards(
        self,
        shards: Sequence[str] | None = None,
        known: Mapping[str, Mapping[str, Mapping[str, str]]] | None = None,
    ) -> dict[str, dict[str, Mapping[str, str]]]:
        """By asset and shard, the tags of the latest materialization; `known` is updated for `shards`."""
        return {
            asset: {
                **(known[asset] if known else {}),
                **_latest_tags(
                    self._instance,
                    self._selection.key(asset),
                    dg.DagsterEventType.ASSET_MATERIALIZATION,
                    shards,
                ),
            }
            for asset in _SHARD_ASSETS
        }

    def _materialize_shard(self, assets: Sequence[str], shard: str) -> bool:
        """Whether it succeeded; a shard that cannot be computed does not stop the others."""
        try:
            self._materialize(assets, partition_key=shard)
        except dg.Failure as failure:
            self._report.failed[shard] = failure.description or "failed"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this shard's, and it is reported
            self._report.failed[shard] = _root_cause(error)
        else:
            return True
        self._log.error(f"shard {shard}: {self._report.failed[shard]}")
        return False

    # All shards

    def _refresh_whole(self) -> None:
        recorded = self._recorded_shards()
        pool = self._instance.get_dynamic_partitions(f"{self._selection.name}_shards")
        # A shard that could not be embedded again keeps its last vectors, unless they are another model's.
        moments = {
            shard: tags[DATA_VERSION_TAG]
            for shard in pool
            if (tags := recorded[embedding_moments.NAME].get(shard, {})).get(MODEL_TAG) == self._fingerprint
        }
        if not moments:
            raise RefreshError(f"no shard could be embedded: {self._failures()}")
        self._materialize_unless(
            subspace_basis.NAME,
            subspace_basis.provenance(self._selection, moments),
            present=self._artifacts.exists(subspace_basis.NAME, suffix=".safetensors"),
        )
        basis_version = self._recorded(subspace_basis.NAME)[DATA_VERSION_TAG]
        score_version = importance_scores.provenance(self._selection, basis_version)
        scored = _latest_tags(
            self._instance,
            self._selection.key(importance_scores.NAME),
            dg.DagsterEventType.ASSET_MATERIALIZATION,
        )
        unscored = {
            shard
            for shard in moments
            if scored.get(shard, {}).get(PROVENANCE_TAG) != score_version
            or not self._artifacts.exists(importance_scores.NAME, shard, suffix=".parquet")
        }
        for first, last in contiguous_ranges(pool, unscored):
            self._materialize_or_raise([importance_scores.NAME], shard_range=(first, last))
        self._materialize_unless(
            selected_subset.NAME,
            selected_subset.provenance(self._selection, dict.fromkeys(moments, score_version)),
            present=self._artifacts.exists(selected_subset.NAME, suffix=".parquet"),
        )
        self._materialize_unless(
            training_dataset.NAME,
            training_dataset.provenance(
                self._selection,
                self._recorded(selected_subset.NAME)[DATA_VERSION_TAG],
                {shard: recorded[raw_samples.NAME][shard][DATA_VERSION_TAG] for shard in moments},
            ),
            present=training_dataset.is_complete(self._artifacts),
        )

    def _materialize_unless(self, asset: str, expected: str, *, present: bool) -> None:
        """Run an asset over all shards unless its output is there and of the expected provenance."""
        if not present or self._recorded(asset).get(PROVENANCE_TAG) != expected:
            self._materialize_or_raise([asset])

    def _recorded(self, asset: str) -> Mapping[str, str]:
        """The tags of the latest materialization of an asset over all shards."""
        event = self._instance.get_latest_materialization_event(self._selection.key(asset))
        materialization = event.asset_materialization if event else None
        return (materialization.tags or {}) if materialization else {}

    def _materialize_or_raise(
        self, assets: Sequence[str], shard_range: tuple[str, str] | None = None
    ) -> None:
        tags = {}
        if shard_range:
            tags = {
                "dagster/asset_partition_range_start": shard_range[0],
                "dagster/asset_partition_range_end": shard_range[1],
            }
        try:
            self._materialize(assets, tags=tags)
        except dg.Failure as failure:
            raise RefreshError(failure.description or f"{assets[0]} failed") from failure
        except Exception as error:
            raise RefreshError(f"{', '.join(assets)}: {_root_cause(error)}") from error

    # Runs

    def _materialize(
        self,
        assets: Sequence[str],
        *,
        partition_key: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """One Dagster run in this process; raises what the asset raises."""
        if self._should_stop():
            raise dg.DagsterExecutionInterruptedError
        self._job.execute_in_process(
            instance=self._instance,
            asset_selection=[self._selection.key(asset) for asset in assets],
            partition_key=partition_key,
            tags={REFRESH_TAG: self._selection.name, **(tags or {})},
            run_config=self._run_config,
        )
        shards = partition_key or "..".join(
            (tags or {}).get(f"dagster/asset_partition_range_{end}", "") for end in ("start", "end")
        )
        self._report.runs.append(f"{'+'.join(assets)}[{shards}]" if shards != ".." else "+".join(assets))

    def _close_interrupted_runs(self) -> None:
        """A killed refresh leaves its run started for ever; the lock shows that nobody works on it."""
        interrupted = self._instance.get_runs(
            dg.RunsFilter(
                job_name=self._job.name,
                tags={REFRESH_TAG: self._selection.name},
                statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING],
            )
        )
        for run in interrupted:
            self._instance.report_run_failed(run, "The refresh that made this run was killed.")

    def _failures(self) -> str:
        return "; ".join(f"{shard}: {message}" for shard, message in self._report.failed.items())


def contiguous_ranges(order: Sequence[str], wanted: set[str]) -> list[tuple[str, str]]:
    """The first and last key of each unbroken run of `wanted` keys in Dagster's partition `order`."""
    ranges: list[tuple[str, str]] = []
    previous: str | None = None
    for key in order:
        if key in wanted:
            if ranges and ranges[-1][1] == previous:
                ranges[-1] = (ranges[-1][0], key)
            else:
                ranges.append((key, key))
        previous = key
    return ranges


def _latest_tags(
    instance: dg.DagsterInstance,
    key: dg.AssetKey,
    event_type: dg.DagsterEventType,
    shards: Sequence[str] | None = None,
) -> dict[str, Mapping[str, str]]:
    """The tags of the latest event by partition, in one query and one more per thousand partitions."""
    ids = instance.get_latest_storage_id_by_partition(
        key, event_type, partitions=None if shards is None else set(shards)
    )
    fetch = (
        instance.fetch_materializations
        if event_type == dg.DagsterEventType.ASSET_MATERIALIZATION
        else instance.fetch_observations
    )
    latest: dict[str, Mapping[str, str]] = {}
    remaining = iter(ids.values())
    while chunk := list(islice(remaining, _RECORDS_PER_QUERY)):
        for record in fetch(dg.AssetRecordsFilter(key, storage_ids=chunk), limit=len(chunk)).records:
            event = record.asset_materialization or record.asset_observation
            if event is not None and event.partition is not None:
                latest[event.partition] = event.tags or {}
    return latest


def _root_cause(error: BaseException) -> str:
    """The message of the exception at the bottom, where Dagster has wrapped it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _exclusive(storage: StorageResource, store: str) -> Iterator[None]:
    """Hold the store's lock; for a remote store, one lock per machine."""
    root = storage.path(store)
    if is_local(root):
        path = Path(root.path) / ".refresh.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
    else:
        path = Path(tempfile.gettempdir()) / f"scalselect-{digest(str(root))}.lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RefreshBusyError(
                f"another refresh is working on {store}; wait for it to end ({path} is its lock)"
            ) from error
        yield


def summary(artifacts: ArtifactStore) -> dict[str, Any]:
    """The last result as the manifest tells it, with the files' places.

    Raises:
        ArtifactMissingError: There is no result yet.
    """
    manifest = training_dataset.read_manifest(artifacts)
    folder = artifacts.root / training_dataset.NAME
    return {
        **{name: manifest[name] for name in ("rows", "embedded", "rejected", "rank", "energy", "selected")},
        "selected_subset": str(artifacts.path(selected_subset.NAME, suffix=".parquet")),
        "training_dataset": str(folder / manifest["training_file"]),
        "manifest": str(artifacts.path(training_dataset.NAME, training_dataset.MANIFEST, suffix=".json")),
    }
