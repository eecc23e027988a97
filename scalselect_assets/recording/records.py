"""The access to Dagster's records: versions, materializations, shards, runs, the device pool and the log.

Every query and every report of this project goes through this module, so that an interruption (Ctrl-C,
SIGTERM or a termination in Dagster's UI) waits until Dagster's transaction has ended; `method.interrupts`
says why it must wait. Other modules pass an instance or a context on and call no method of it. An
interruption that came during a call is raised as the call returns. Costs: one query per call, where a method
states no other number.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import dagster as dg
from dagster._core.event_api import PartitionKeyFilter
from dagster._core.storage.asset_check_execution_record import (
    AssetCheckExecutionRecord,
    AssetCheckExecutionRecordStatus,
)

from scalselect_assets.method.interrupts import deferred
from scalselect_assets.recording.data_versions import DATA_VERSION_TAG, recorded
from scalselect_assets.recording.partitions import shards_name
from scalselect_assets.resources.shown_text import shown

RunContext: TypeAlias = dg.AssetExecutionContext | dg.OpExecutionContext

_COMPLETED = {AssetCheckExecutionRecordStatus.SUCCEEDED, AssetCheckExecutionRecordStatus.FAILED}
_RECORDS_PER_QUERY = 1000
"""The limit that Dagster itself sets."""

_NEWEST_PER_QUERY = 100
"""Page size of a search that mostly ends at the newest record."""


_SHARDS_AT_ONCE = 10_000
"""SQLite takes 32,766 variables in one statement by default, and Dagster asks for all shards in one."""


@dataclass(frozen=True, slots=True)
class MadeBy:
    """The run that recorded a version.

    Attributes:
        run_id: Dagster's id of the run.
        job: The run's job; None if the run is no longer known.
        at: The time in UTC at which the version was recorded.
    """

    run_id: str
    job: str | None
    at: datetime

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the path of the run's page in the UI."""
        return {
            "run_id": self.run_id,
            "job": self.job,
            "at": self.at.isoformat(timespec="seconds"),
            "ui": f"/runs/{self.run_id}",
        }


def open_instance(folder: Path) -> dg.DagsterInstance:
    """The instance that a folder's ``dagster.yaml`` configures; the first call makes its tables."""
    with deferred():
        return dg.DagsterInstance.from_config(str(folder))


class Records:
    """The records of one Dagster instance, to be read and to be extended."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self._instance = instance

    @contextmanager
    def _uninterrupted(self) -> Iterator[dg.DagsterInstance]:
        """The instance, for a block that an interruption waits for."""
        with deferred():
            yield self._instance

    # Versions

    def latest_versions(self, asset: dg.AssetKey, shards: Collection[str]) -> dict[str, Mapping[str, str]]:
        """Both versions that the latest materialization of each shard recorded.

        Shards that were never materialized are left out; shards other than the given ones may be included.
        Costs one query, and one more for each thousand shards.
        """
        kind = dg.DagsterEventType.ASSET_MATERIALIZATION
        return {
            made.partition: recorded(made)
            for record in self._latest_by_shard(kind, asset, shards)
            if (made := record.asset_materialization) is not None and made.partition is not None
        }

    def latest_observed(self, asset: dg.AssetKey, shards: Collection[str]) -> dict[str, str]:
        """The data version that the latest observation of each shard recorded.

        Shards and costs are those of `latest_versions`.
        """
        kind = dg.DagsterEventType.ASSET_OBSERVATION
        return {
            seen.partition: seen.tags.get(DATA_VERSION_TAG, "")
            for record in self._latest_by_shard(kind, asset, shards)
            if (seen := record.asset_observation) is not None and seen.partition is not None
        }

    def made_by(self, asset: dg.AssetKey, shard: str | None, data_version: str) -> MadeBy | None:
        """The run of the latest materialization that recorded a version, or None.

        Costs one query for each hundred materializations that are newer, and one for the run.
        """
        wanted = dg.AssetRecordsFilter(asset, asset_partitions=None if shard is None else [shard])
        kind = dg.DagsterEventType.ASSET_MATERIALIZATION
        for record in self._records(kind, wanted, _NEWEST_PER_QUERY):
            if record.run_id and _is_of(record.asset_materialization, data_version):
                with self._uninterrupted() as instance:
                    run = instance.get_run_by_id(record.run_id)
                at = datetime.fromtimestamp(record.timestamp, UTC)
                return MadeBy(record.run_id, run.job_name if run else None, at)
        return None

    # Materializations and observations

    def latest_materialization(self, asset: dg.AssetKey) -> dg.AssetMaterialization | None:
        """The latest materialization of any partition, or None."""
        with self._uninterrupted() as instance:
            event = instance.get_latest_materialization_event(asset)
        return event.asset_materialization if event else None

    def latest_storage_id(self, asset: dg.AssetKey) -> int | None:
        """The place of an asset's latest materialization in the event log, or None."""
        kind = dg.DagsterEventType.ASSET_MATERIALIZATION
        newest = next(self._records(kind, dg.AssetRecordsFilter(asset), 1), None)
        return newest.storage_id if newest else None

    def materializations_since(
        self, asset: dg.AssetKey, storage_id: int | None
    ) -> Iterator[dg.AssetMaterialization]:
        """All materializations after a place in the event log, or from the first on; the newest comes first.

        Costs one query for each thousand.
        """
        wanted = dg.AssetRecordsFilter(asset, after_storage_id=storage_id)
        for record in self._records(dg.DagsterEventType.ASSET_MATERIALIZATION, wanted):
            if record.asset_materialization is not None:
                yield record.asset_materialization

    def latest_observation(self, asset: dg.AssetKey) -> dg.AssetObservation | None:
        """The latest observation of an asset, or None."""
        kind = dg.DagsterEventType.ASSET_OBSERVATION
        newest = next(self._records(kind, dg.AssetRecordsFilter(asset), 1), None)
        return newest.asset_observation if newest else None

    def report(self, event: dg.AssetMaterialization | dg.AssetObservation) -> None:
        """Record an event that no run makes."""
        with self._uninterrupted() as instance:
            instance.report_runless_asset_event(event)

    # Shards

    def known_shards(self, selection_name: str) -> Sequence[str]:
        """The shards of one selection that Dagster knows, in its order."""
        with self._uninterrupted() as instance:
            return instance.get_dynamic_partitions(shards_name(selection_name))

    def add_shards(self, selection_name: str, shards: Sequence[str]) -> None:
        """Make shards known to Dagster; each transaction adds as many as one statement of SQLite can hold."""
        for start in range(0, len(shards), _SHARDS_AT_ONCE):
            with self._uninterrupted() as instance:
                instance.add_dynamic_partitions(
                    shards_name(selection_name), shards[start : start + _SHARDS_AT_ONCE]
                )

    def delete_shards(self, selection_name: str, shards: Iterable[str]) -> None:
        """Make Dagster forget shards, one by one."""
        for shard in shards:
            with self._uninterrupted() as instance:
                instance.delete_dynamic_partition(shards_name(selection_name), shard)

    # Runs

    def execute(
        self,
        job: dg.JobDefinition,
        assets: Sequence[dg.AssetKey],
        *,
        partition_key: str | None = None,
        tags: Mapping[str, str] | None = None,
        run_config: Mapping[str, Any] | None = None,
    ) -> dg.ExecuteInProcessResult:
        """Materialize assets of a job in one run in this process.

        Dagster allows interruptions again in what an asset computes. One that it forgets as the run ends is
        raised here.

        Raises:
            Exception: What an asset raised.
        """
        with self._uninterrupted() as instance:
            return job.execute_in_process(
                instance=instance,
                asset_selection=assets,
                partition_key=partition_key,
                tags=tags,
                run_config=run_config,
            )

    def runs(self, wanted: dg.RunsFilter) -> Sequence[dg.RunRecord]:
        """The records of the runs that match a filter, the newest first."""
        with self._uninterrupted() as instance:
            return instance.get_run_records(wanted)

    def is_being_stopped(self, run_id: str) -> bool:
        """Whether somebody has asked Dagster to end a run, which it may not have done yet."""
        with self._uninterrupted() as instance:
            run = instance.get_run_by_id(run_id)
        stopped = {dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED}
        return run is not None and run.status in stopped

    def close_runs(self, wanted: dg.RunsFilter, why: str) -> None:
        """Record as failed, with a message, all runs that match a filter."""
        with self._uninterrupted() as instance:
            for run in instance.get_runs(wanted):
                instance.report_run_failed(run, why)

    def ends_dead_runs(self) -> bool:
        """Whether this deployment's launcher finds and ends runs whose process is gone."""
        with self._uninterrupted() as instance:
            return instance.run_launcher.supports_check_run_worker_health

    # Device pools

    def set_default_limit(self, pool: str) -> None:
        """Give a device pool the instance's default limit, if there is one and the pool has no limit yet."""
        with self._uninterrupted() as instance:
            has_default = instance.global_op_concurrency_default_limit is not None
            if has_default and pool not in _limited_pools(instance):
                instance.event_log_storage.initialize_concurrency_limit_to_default(pool)

    def is_limited_by_op(self, pool: str) -> bool:
        """Whether a device pool has a limit that counts ops rather than runs."""
        with self._uninterrupted() as instance:
            config = instance.get_concurrency_config().pool_config
            has_limit = config.default_pool_limit is not None or pool in _limited_pools(instance)
        by_run = config.pool_granularity is not None and config.pool_granularity.value == "run"
        return has_limit and not by_run

    # Checks

    def last_check(
        self, check: dg.AssetCheckKey, shard: str | None = None
    ) -> AssetCheckExecutionRecord | None:
        """The last completed evaluation of a check, for one shard if the check has a result per shard."""
        with self._uninterrupted() as instance:
            records = instance.event_log_storage.get_asset_check_execution_history(
                check,
                limit=1,
                status=_COMPLETED,
                partition_filter=None if shard is None else PartitionKeyFilter(key=shard),
            )
        return records[0] if records else None

    def shards_that_failed(self, check: dg.AssetCheckKey) -> set[str]:
        """The shards among a check's last thousand failures, including shards that have passed since."""
        with self._uninterrupted() as instance:
            failed = instance.event_log_storage.get_asset_check_execution_history(
                check, limit=_RECORDS_PER_QUERY, status={AssetCheckExecutionRecordStatus.FAILED}
            )
        return {record.partition for record in failed if record.partition is not None}

    # The event log, page by page

    def _records(
        self, kind: dg.DagsterEventType, wanted: dg.AssetRecordsFilter, per_query: int | None = None
    ) -> Iterator[dg.EventLogRecord]:
        """An asset's records, the newest first; a page is fetched only when a record of it is needed."""
        cursor = None
        while True:
            with self._uninterrupted() as instance:
                fetch = (
                    instance.fetch_materializations
                    if kind is dg.DagsterEventType.ASSET_MATERIALIZATION
                    else instance.fetch_observations
                )
                page = fetch(wanted, limit=per_query or _RECORDS_PER_QUERY, cursor=cursor)
            yield from page.records
            if not page.has_more:
                return
            cursor = page.cursor

    def _latest_by_shard(
        self, kind: dg.DagsterEventType, asset: dg.AssetKey, shards: Collection[str]
    ) -> Iterator[dg.EventLogRecord]:
        # A long list of names makes a slow query; the partitions that are not asked for are few.
        names = set(shards) if len(shards) == 1 else None
        with self._uninterrupted() as instance:
            ids = instance.get_latest_storage_id_by_partition(asset, kind, partitions=names)
        remaining = iter(ids.values())
        while some := list(islice(remaining, _RECORDS_PER_QUERY)):
            wanted = dg.AssetRecordsFilter(asset, storage_ids=some)
            # Each id has one record, so the query after a full page would find nothing.
            yield from islice(self._records(kind, wanted), len(some))


class RunRecords(Records):
    """The records of the instance that a run belongs to, with the run's own log, events and shards."""

    def __init__(self, context: RunContext) -> None:
        super().__init__(context.instance)
        self._context = context

    @property
    def log(self) -> "RunLog":
        """The run's log."""
        return RunLog(self._context.log)

    def shards(self) -> Sequence[str]:
        """The shards that the run covers: one, or a range, which Dagster looks up among those it knows."""
        with self._uninterrupted():
            return self._context.partition_keys

    def add_metadata(self, asset: dg.AssetKey, shard: str, metadata: Mapping[str, Any]) -> None:
        """Give one shard its own metadata in this run; Dagster looks up whether it knows the shard."""
        if not isinstance(self._context, dg.AssetExecutionContext):
            raise TypeError(
                f"got a {type(self._context).__name__}; only the run of an asset has its metadata"
            )
        with self._uninterrupted():
            self._context.add_asset_metadata(metadata, asset_key=asset, partition_key=shard)

    def log_event(
        self, event: dg.AssetMaterialization | dg.AssetObservation | dg.AssetCheckEvaluation
    ) -> None:
        """Record an event of this run at once; what an asset returns is recorded as the asset ends."""
        # Both kinds of context take all three kinds of events; only one of them is annotated so.
        log: Callable[[Any], None] = self._context.log_event
        with self._uninterrupted():
            log(event)


class RunLog(logging.LoggerAdapter[logging.Logger]):
    """A run's log, in which no text of the pool acts on a terminal.

    Its lines are events in Dagster's records, so an interruption waits for the end of one.
    """

    def log(self, level: int, msg: object, *args: object, **more: Any) -> None:
        """Write one line; all other methods of a log come here."""
        with deferred():
            super().log(level, shown(msg) if isinstance(msg, str) else msg, *args, **more)


def _is_of(materialization: dg.AssetMaterialization | None, data_version: str) -> bool:
    """Whether a materialization recorded this version.

    A run over many shards records each one's version as metadata; Dagster's tag is then one for all.
    """
    if materialization is None:
        return False
    tags = materialization.tags or {}
    return data_version in {recorded(materialization).get("data_version"), tags.get(DATA_VERSION_TAG)}


def _limited_pools(instance: dg.DagsterInstance) -> set[str]:
    return {limit.name for limit in instance.event_log_storage.get_pool_limits()}
