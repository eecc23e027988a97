"""Discovery, and materializing exactly what is stale: one process, the model loaded once.

`Refresh.run` is what `scalselect run` calls and what the ``<selection>_refresh`` job wraps. It finds the
shards, reports their versions to Dagster, compares the provenance that each asset would have now with the
recorded one, and runs what differs, as ordinary Dagster runs. Nothing stale means no run. It can be killed at
any point: the next call continues from what was committed. One refresh at a time per store, by a file lock.

Costs without work: one stat per shard file and per image, a few file headers per shard, and one event-log
query per asset.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from scalselect_assets.asset_path import ShardAsset
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts, reuse
from scalselect_assets.method.interrupts import deferred
from scalselect_assets.operations.faults import RefreshError, error_cause, error_message
from scalselect_assets.operations.staleness import Staleness, contiguous_ranges
from scalselect_assets.pool import raw_samples
from scalselect_assets.pool.discovery import Discovery, report_discovery, settled_discovery
from scalselect_assets.resources.artifacts import (
    RECORD,
    ArtifactCorruptError,
)
from scalselect_assets.resources.embedding_store import EmbeddingTableError
from scalselect_assets.resources.progress import Progress
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource
from scalselect_assets.subspace import subspace_basis

REFRESH_TAG = "scalselect/refresh"


@dataclass(slots=True)
class RefreshReport:
    """What one refresh did.

    Attributes:
        added: Shards new to Dagster.
        removed: Shards that are gone from the pool.
        embedded: Shards whose vectors were materialized.
        computed_rows: Vectors among them that the model computed.
        reused_rows: Vectors among them that were there before.
        unsettled: Shards that are still being written, and were left as they are in the store.
        failed: Message by shard for those that could not be materialized.
        failed_checks: Asset checks of severity ERROR that failed, with what they saw.
        runs: Dagster runs that were made, in order: assets and shards.
    """

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    embedded: list[str] = field(default_factory=list)
    computed_rows: int = 0
    reused_rows: int = 0
    unsettled: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    failed_checks: dict[str, str] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """One line for each shard and each check that failed; empty if all is well."""
        return [
            *(f"shard {shard} failed: {message}" for shard, message in self.failed.items()),
            *(f"check failed: {check} {seen}" for check, seen in self.failed_checks.items()),
        ]


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
        rebuild_basis: bool = False,
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
            rebuild_basis: Add up the moments of all shards anew, even if nothing is stale.
            should_stop: Asked before every run.
        """
        self._selection, self._job, self._instance = selection, job, instance
        self._storage, self._vlm, self._progress, self._log = storage, vlm, progress, log
        self._run_config = {"loggers": {"console": {"config": {"log_level": log_level}}}}
        self._rebuild_basis = rebuild_basis
        self._should_stop = should_stop
        self._artifacts = storage.artifacts(selection.store)
        self._source = storage.samples(selection.source, selection.image_root, selection.store)
        self._staleness = Staleness(selection, storage, vlm, instance)
        self._report = RefreshReport()

    def run(self) -> RefreshReport:
        """Bring every asset of the selection up to date.

        Raises:
            StoreBusyError: Another refresh works on the store.
            RefreshError: The selection is driven otherwise, the pool has no shards, an asset over all shards
                failed, or the model changed meanwhile.
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
            if not discovery.versions:
                if discovery.unsettled:
                    raise RefreshError(
                        f"all shard files in {self._selection.source} are still being written; run again "
                        "when that has ended"
                    )
                raise RefreshError(
                    f"no shard files (*.json, *.jsonl, *.ndjson) in {self._selection.source}; a shard is a "
                    "JSON array or JSON Lines file of samples"
                )
            self._report.added, self._report.removed = report_discovery(
                self._selection, self._instance, discovery
            )
            for shard in self._report.removed:
                reuse.forget(self._artifacts, shard)
            self._refresh_shards(discovery)
            if self._staleness.model_fingerprint_now() != self._staleness.model_fingerprint:
                raise RefreshError("the target model's files changed during the refresh; run it again")
            self._refresh_pool()
            return self._report

    # Shards

    def _refresh_shards(self, discovery: Discovery) -> None:
        stale = self._staleness.stale_shards(discovery.versions)
        embedding = [shard for shard, assets in stale.items() if receipts.NAME in assets]
        self._progress.planned(len(embedding), sum(discovery.n_rows[shard] or 0 for shard in embedding))
        if embedding:
            # A model that cannot be loaded is said once, before anything is touched.
            self._vlm.encoder(self._artifacts, **self._selection.target)
        for shard, assets in stale.items():
            if assets[0] == raw_samples.NAME and self._artifacts.exists(receipts.NAME, shard, suffix=RECORD):
                # Where the rows turn out as they were, after a change of code say, their vectors stand.
                if not self._materialize_shard([raw_samples.NAME], shard):
                    continue
                alone = {shard: discovery.versions[shard]}
                assets = self._staleness.stale_shards(alone).get(shard, [])  # noqa: PLW2901
            if not assets or not self._materialize_shard(assets, shard):
                continue
            if receipts.NAME in assets:
                self._report.embedded.append(shard)

    def _materialize_shard(self, assets: Sequence[str], shard: str) -> bool:
        """Whether it succeeded; a shard that cannot be computed does not stop the others."""
        try:
            self._materialize(assets, partition_key=shard)
        except dg.Failure as failure:
            self._report.failed[shard] = failure.description or "failed"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this shard's, and it is reported
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
        for asset in staleness.rest:
            if isinstance(asset, ShardAsset):
                stale = staleness.stale_shards_of(asset, state)
                for shard_range in contiguous_ranges(state.shards, stale):
                    self._materialize_or_raise(asset.name, shard_range)
                    state.forget(asset)
            elif staleness.is_stale(asset, state) or (self._rebuild_basis and asset is subspace_basis.ASSET):
                self._materialize_or_raise(asset.name)
                state.forget(asset)

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
            messages = [failure.description or f"{asset} failed", *self._report.problems()]
            raise RefreshError("; ".join(messages)) from failure
        except Exception as error:
            if remedy := self._forget_unreadable(error):
                raise RefreshError(f"{error_cause(error)}: {remedy}") from error
            raise RefreshError(f"{asset}: {error_message(error)}") from error

    def _forget_unreadable(self, error: Exception) -> str | None:
        """Remove what could not be read, so that the next run makes it again; returns the remedy."""
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

    @deferred()
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
        result = self._job.execute_in_process(
            instance=self._instance,
            asset_selection=[self._selection.key(asset) for asset in assets],
            partition_key=partition_key,
            tags={REFRESH_TAG: self._selection.name, **(tags or {})},
            run_config=self._configuration(assets),
        )
        self._note_failed_checks(result, partition_key)
        self._note_embedded_rows(result)
        shards = partition_key or "..".join(
            (tags or {}).get(f"dagster/asset_partition_range_{end}", "") for end in ("start", "end")
        )
        self._report.runs.append(f"{'+'.join(assets)}[{shards}]" if shards != ".." else "+".join(assets))

    def _configuration(self, assets: Sequence[str]) -> dict[str, Any]:
        if not (self._rebuild_basis and subspace_basis.NAME in assets):
            return self._run_config
        op = self._selection.key(subspace_basis.NAME).to_python_identifier()
        return {**self._run_config, "ops": {op: {"config": {"rebuild": True}}}}

    def _note_embedded_rows(self, result: dg.ExecuteInProcessResult) -> None:
        for event in result.get_asset_materialization_events():
            if event.asset_key == self._selection.key(receipts.NAME):
                rows = event.step_materialization_data.materialization.metadata
                self._report.computed_rows += int(str(rows["computed_rows"].value))
                self._report.reused_rows += int(str(rows["reused_rows"].value))

    def _note_failed_checks(self, result: dg.ExecuteInProcessResult, shard: str | None) -> None:
        for check in result.get_asset_check_evaluations():
            if not check.passed and check.severity is dg.AssetCheckSeverity.ERROR:
                place = f"{check.asset_key.path[-1]}[{shard}]" if shard else check.asset_key.path[-1]
                seen = {name: value.value for name, value in check.metadata.items()}
                self._report.failed_checks[f"{place}: {check.check_name}"] = str(seen)

    @contextlib.contextmanager
    def _interrupted_runs_closed(self) -> Iterator[None]:
        """Close the runs that a killed refresh has left behind, and those of this one if it is stopped."""
        self._close_interrupted_runs()
        try:
            yield
        except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
            self._close_interrupted_runs()
            raise

    @deferred()
    def _close_interrupted_runs(self) -> None:
        """A stopped refresh may leave its run begun for ever; the lock shows that nobody works on it."""
        interrupted = self._instance.get_runs(
            dg.RunsFilter(
                job_name=self._job.name,
                tags={REFRESH_TAG: self._selection.name},
                statuses=[
                    dg.DagsterRunStatus.NOT_STARTED,
                    dg.DagsterRunStatus.STARTED,
                    dg.DagsterRunStatus.STARTING,
                    dg.DagsterRunStatus.CANCELING,
                ],
            )
        )
        for run in interrupted:
            self._instance.report_run_failed(run, "The refresh that made this run was stopped.")
