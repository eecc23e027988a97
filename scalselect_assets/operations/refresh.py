"""The refresh: it discovers the shards and materializes exactly what is stale, in one process with one model.

`scalselect run` and the ``<selection>_refresh`` job call `Refresh.run`. It finds the shards, reports their
versions to Dagster, compares the provenance that each asset would have now with the recorded one, and
materializes what differs, in ordinary Dagster runs. If nothing is stale, there is no run. A refresh can be
killed at any point: the next one continues from what was committed. A file lock allows one refresh at a time
per store.

Costs without work: one stat per shard file and per image, a few file headers per shard, and one event-log
query per asset.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from scalselect_assets.asset_path import ShardAsset
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts, reuse
from scalselect_assets.operations.damaged_records import is_fault_of_records
from scalselect_assets.operations.early_checks import check_declaration, check_quotas
from scalselect_assets.operations.faults import (
    NothingEmbeddedError,
    RefreshError,
    error_cause,
    error_message,
)
from scalselect_assets.operations.rejections import explain_rejections
from scalselect_assets.operations.staleness import Staleness, contiguous_ranges
from scalselect_assets.pool import raw_samples
from scalselect_assets.pool.discovery import Discovery, report_discovery, settled_discovery
from scalselect_assets.pool.missing_images import n_kept, newly_missing
from scalselect_assets.recording.checks import FAILED_CHECKS
from scalselect_assets.recording.records import Records
from scalselect_assets.resources.artifacts import RECORD, ArtifactCorruptError, ArtifactMissingError
from scalselect_assets.resources.embedding_store import EmbeddingTable, EmbeddingTableError
from scalselect_assets.resources.forms.registry import SHARD_SUFFIXES
from scalselect_assets.resources.pool_listing import in_words
from scalselect_assets.resources.progress import Log, Progress
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource
from scalselect_assets.subspace import subspace_basis

REFRESH_TAG = "scalselect/refresh"


@dataclass(slots=True)
class RefreshReport:
    """The results of one refresh.

    Attributes:
        added: Shards that Dagster did not know before.
        removed: Shards that are no longer in the pool.
        embedded: Shards whose vectors were materialized.
        computed_rows: Number of vectors in these shards that the model computed.
        reused_rows: Number of vectors in these shards that were there before.
        unsettled: Shards that are still being written; the store keeps their earlier state.
        passed_over: Files of the pool's folder that are not read, by kind; see `PoolListing`.
        failed: An error message for each shard that could not be materialized.
        kept_rows: Number of rows of each shard that keep their vectors while their images are missing.
        damaged: A message for each file that was found damaged; it was made again.
        failed_checks: The metadata of each asset check of severity ERROR that failed.
        runs: The assets and shards of each Dagster run, in order.
    """

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    embedded: list[str] = field(default_factory=list)
    computed_rows: int = 0
    reused_rows: int = 0
    unsettled: list[str] = field(default_factory=list)
    passed_over: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    kept_rows: dict[str, int] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    failed_checks: dict[str, str] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """One line for each shard that failed; empty if all is well."""
        return [f"shard {shard} failed: {message}" for shard, message in self.failed.items()]


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
        log: Log,
        log_level: str = "INFO",
        rebuild_basis: bool = False,
        accept_missing_images: bool = False,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Prepare a refresh.

        Args:
            selection: The selection to refresh.
            job: The selection's asset job, with its resources.
            instance: The instance where runs and versions are recorded.
            storage: Opens pool and store.
            vlm: Loads the target model.
            progress: Follows the embedding.
            log: Receives the refresh's own messages.
            log_level: Log level of the runs' console output.
            rebuild_basis: Whether to add up the moments of all shards anew, even if nothing is stale.
            accept_missing_images: Whether a person agrees that missing images are gone, so that their rows
                lose their vectors.
            should_stop: Called before every run; the refresh stops if it returns true.
        """
        self._selection, self._job, self._instance = selection, job, instance
        self._records = Records(instance)
        self._storage, self._vlm, self._progress, self._log = storage, vlm, progress, log
        self._run_config = {"loggers": {"console": {"config": {"log_level": log_level}}}}
        self._rebuild_basis, self._accept_missing = rebuild_basis, accept_missing_images
        self._should_stop = should_stop
        self._artifacts = storage.artifacts(selection.store)
        self._source = selection.open_pool(storage)
        self._staleness = Staleness(selection, storage, vlm, instance)
        self._report = RefreshReport(damaged=self._staleness.verified.damaged)

    def run(self) -> RefreshReport:
        """Bring every asset of the selection up to date.

        Raises:
            StoreBusyError: Another refresh works on the store.
            RefreshError: The selection is driven otherwise or cannot work as declared, the pool has no
                shards, an asset over all shards failed, or the model changed meanwhile.
            NothingEmbeddedError: Every row of the pool is rejected.
            SampleListError: A list of samples cannot be read.
            EvaluationSetError: The evaluation set cannot be used.
            FileNotFoundError: The pool does not exist.
        """
        if self._selection.is_declarative:
            name = self._selection.name
            raise RefreshError(
                f"the selection {name!r} declares `automation: {self._selection.automation}`: Dagster's own "
                f"automation brings it up to date, and a refresh beside it would do work twice; turn on the "
                f"sensors {name}_discovery and {name}_automation in the UI, or declare `automation: refresh`"
            )
        with self._storage.locks(self._selection.store).refreshing(), self._interrupted_runs_closed():
            discovery = settled_discovery(self._source, self._artifacts, self._selection.settle_seconds)
            self._report.unsettled = list(discovery.unsettled)
            self._report.passed_over = dict(discovery.passed_over)
            check_declaration(self._selection, self._storage, self._vlm)
            if not discovery.versions:
                if discovery.unsettled:
                    raise RefreshError(
                        f"all shard files in {self._selection.source} are still being written; run again "
                        "when that has ended"
                    )
                there = in_words(discovery.passed_over)
                raise RefreshError(
                    f"no shard files in {self._selection.source}; a shard is a file of samples whose name "
                    f"ends with one of {', '.join(SHARD_SUFFIXES)}"
                    f"{f'; there are, and are not read: {there}' if there else ''}"
                )
            if not self._accept_missing:
                self._require_images(discovery)
            self._report.added, self._report.removed = report_discovery(
                self._selection, self._instance, discovery
            )
            for shard in self._report.removed:
                reuse.forget(self._artifacts, shard)
            self._refresh_shards(discovery)
            self._report.kept_rows = n_kept(self._artifacts, raw_samples.NAME, discovery.missing_images)
            if self._staleness.model_fingerprint_now() != self._staleness.model_fingerprint:
                raise RefreshError("the target model's files changed during the refresh; run it again")
            self._refresh_pool()
            self._staleness.verified.save()
            return self._report

    def _require_images(self, discovery: Discovery) -> None:
        """Stop before anything is computed if too many images are newly missing.

        Raises:
            RefreshError: More than the declared share of the images is newly missing.
        """
        found = newly_missing(self._artifacts, raw_samples.NAME, discovery.missing_images, discovery.n_images)
        if found.share > (most := self._selection.max_missing_images):
            raise RefreshError(
                f"{found.n_images:,} of {found.n_named:,} images ({found.share:.1%}) that were there are "
                f"missing now, in {len(found.shards):,} shards, for example {found.example}; allowed are "
                f"{most:.1%} (max_missing_images). Nothing was changed. Mount the file system that holds "
                f"them below {self._source.images_folder()}; or, where they are gone for good, run with "
                "--accept-missing-images, and their rows leave the selection"
            )

    # Shards

    def _refresh_shards(self, discovery: Discovery) -> None:
        stale = self._staleness.stale_shards(discovery.versions)
        if self._accept_missing:
            for shard in n_kept(self._artifacts, raw_samples.NAME, discovery.missing_images):
                stale[shard] = [asset.name for asset in self._staleness.first]
        embedding = [shard for shard, assets in stale.items() if receipts.NAME in assets]
        self._progress.planned(len(embedding), sum(discovery.n_rows[shard] or 0 for shard in embedding))
        if embedding and any(quota.floors for quota in self._selection.quotas):
            stale = self._read_all(stale, discovery)
        if embedding:
            # A model that cannot be loaded is reported once, before anything is changed.
            self._vlm.encoder(self._artifacts, **self._selection.target)
        for shard, assets in stale.items():
            is_embedded = self._artifacts.exists(receipts.NAME, shard, suffix=RECORD)
            if assets and assets[0] == raw_samples.NAME and is_embedded:
                # If the rows come out the same, for example after a change of code, their vectors stay.
                if not self._materialize_shard([raw_samples.NAME], shard):
                    continue
                alone = {shard: discovery.versions[shard]}
                assets = self._staleness.stale_shards(alone).get(shard, [])  # noqa: PLW2901
            if not assets or not self._materialize_shard(assets, shard):
                continue
            if receipts.NAME in assets:
                self._report.embedded.append(shard)

    def _read_all(self, stale: Mapping[str, list[str]], discovery: Discovery) -> dict[str, list[str]]:
        """Read every shard before any is embedded, and return the assets that are stale then.

        Raises:
            RefreshError: A floor asks for more rows of a source than there are.
        """
        unread = [shard for shard, assets in stale.items() if assets[0] == raw_samples.NAME]
        read = [shard for shard in unread if self._materialize_shard([raw_samples.NAME], shard)]
        check_quotas(self._selection, self._artifacts, discovery.versions)
        rest = {shard: list(assets) for shard, assets in stale.items() if shard not in unread}
        # Only now is the model asked for its fingerprint.
        rest |= self._staleness.stale_shards({shard: discovery.versions[shard] for shard in read})
        return rest

    def _materialize_shard(self, assets: Sequence[str], shard: str) -> bool:
        """Materialize assets of one shard; returns whether that succeeded.

        A shard that cannot be computed does not stop the others.
        """
        try:
            self._materialize(assets, partition_key=shard)
        except dg.Failure as failure:
            self._report.failed[shard] = failure.description or "failed"
            self._note_failed_checks(failure, f"{receipts.NAME}[{shard}]")
        except Exception as error:
            if is_fault_of_records(error):
                raise
            # Any other error is reported as this shard's.
            self._report.failed[shard] = error_message(error)
            self._forget_unreadable(error)
        else:
            return True
        self._log.error(f"shard {shard}: {self._report.failed[shard]}")
        return False

    # All shards

    def _refresh_pool(self) -> None:
        staleness = self._staleness
        state = staleness.state()
        if not state.once(subspace_basis.inputs):
            raise RefreshError(f"no shard could be embedded: {'; '.join(self._report.problems())}")
        if not any(table.n_rows for table in self._tables(state.shards)):
            raise NothingEmbeddedError(
                "no sample of the pool is embedded, so there is nothing to select from. Rejected:\n"
                + explain_rejections(self._selection, self._storage, self._artifacts, state.shards)
            )
        for asset in staleness.rest:
            if isinstance(asset, ShardAsset):
                stale = staleness.stale_shards_of(asset, state)
                for shard_range in contiguous_ranges(state.shards, stale):
                    self._materialize_or_raise(asset.name, shard_range)
                    state.forget(asset)
            elif staleness.is_stale(asset, state) or (self._rebuild_basis and asset is subspace_basis.ASSET):
                self._materialize_or_raise(asset.name)
                state.forget(asset)

    def _tables(self, shards: Iterable[str]) -> Iterator[EmbeddingTable]:
        """The vectors of the shards that have a receipt."""
        for shard in shards:
            with contextlib.suppress(ArtifactMissingError, ArtifactCorruptError):
                yield receipts.recorded_table(self._artifacts, shard)[0]

    def _materialize_or_raise(self, asset: str, shard_range: tuple[str, str] | None = None) -> None:
        tags = {}
        if shard_range:
            tags = {
                "dagster/asset_partition_range_start": shard_range[0],
                "dagster/asset_partition_range_end": shard_range[1],
            }
        try:
            self._materialize([asset], tags=tags)
        except dg.Failure as failure:
            self._note_failed_checks(failure, asset)
            messages = [failure.description or f"{asset} failed", *self._report.problems()]
            raise RefreshError("; ".join(messages)) from failure
        except Exception as error:
            if remedy := self._forget_unreadable(error):
                raise RefreshError(f"{error_cause(error)}: {remedy}") from error
            raise RefreshError(f"{asset}: {error_message(error)}") from error

    def _forget_unreadable(self, error: Exception) -> str | None:
        """Remove a file that could not be read, so that the next run makes it again; returns the remedy."""
        cause = error_cause(error)
        if isinstance(cause, EmbeddingTableError):
            receipt = self._artifacts.path(receipts.NAME, cause.shard, suffix=RECORD)
            receipt.unlink(missing_ok=True)
            return "run again, which embeds the shard anew"
        if isinstance(cause, ArtifactCorruptError):
            cause.path.unlink(missing_ok=True)
            return "it is removed; run again, which makes it anew"
        return None

    # Runs

    def _materialize(
        self,
        assets: Sequence[str],
        *,
        partition_key: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Make one Dagster run in this process; raises what the asset raises."""
        if self._should_stop():
            raise dg.DagsterExecutionInterruptedError
        result = self._records.execute(
            self._job,
            [self._selection.key(asset) for asset in assets],
            partition_key=partition_key,
            tags={REFRESH_TAG: self._selection.name, **(tags or {})},
            run_config=self._configuration(assets),
        )
        self._note_embedded_rows(result)
        shards = partition_key or "..".join(
            (tags or {}).get(f"dagster/asset_partition_range_{end}", "") for end in ("start", "end")
        )
        self._report.runs.append(f"{'+'.join(assets)}[{shards}]" if shards != ".." else "+".join(assets))

    def _configuration(self, assets: Sequence[str]) -> dict[str, Any]:
        asked = {
            subspace_basis.NAME: {"rebuild": True} if self._rebuild_basis else {},
            raw_samples.NAME: {"accept_missing_images": True} if self._accept_missing else {},
        }
        ops = {
            self._selection.key(asset).to_python_identifier(): {"config": asked[asset]}
            for asset in assets
            if asked.get(asset)
        }
        return {**self._run_config, **({"ops": ops} if ops else {})}

    def _note_embedded_rows(self, result: dg.ExecuteInProcessResult) -> None:
        for event in result.get_asset_materialization_events():
            if event.asset_key == self._selection.key(receipts.NAME):
                rows = event.step_materialization_data.materialization.metadata
                self._report.computed_rows += int(str(rows["computed_rows"].value))
                self._report.reused_rows += int(str(rows["reused_rows"].value))

    def _note_failed_checks(self, failure: dg.Failure, place: str) -> None:
        """Keep the metadata of failed checks, by asset and check, for programs that read the report."""
        failed = failure.metadata.get(FAILED_CHECKS)
        if isinstance(failed, dg.JsonMetadataValue) and isinstance(failed.value, Mapping):
            for name, seen in failed.value.items():
                self._report.failed_checks[f"{place}: {name}"] = str(seen)

    @contextlib.contextmanager
    def _interrupted_runs_closed(self) -> Iterator[None]:
        """Close the runs that an earlier refresh left unfinished, and those of this one if it is stopped."""
        self._close_interrupted_runs()
        try:
            yield
        except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
            self._close_interrupted_runs()
            raise

    def _close_interrupted_runs(self) -> None:
        """Close the runs of a stopped refresh, which would otherwise stay unfinished for ever.

        The lock of this refresh shows that nobody works on them.
        """
        interrupted = dg.RunsFilter(
            job_name=self._job.name,
            tags={REFRESH_TAG: self._selection.name},
            statuses=[
                dg.DagsterRunStatus.NOT_STARTED,
                dg.DagsterRunStatus.STARTED,
                dg.DagsterRunStatus.STARTING,
                dg.DagsterRunStatus.CANCELING,
            ],
        )
        self._records.close_runs(interrupted, "The refresh that made this run was stopped.")
