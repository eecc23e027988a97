"""The jobs and the schedule of a selection: refresh, nightly rescoring, cleaning."""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import dagster as dg
from pydantic import Field

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import device_pool, receipts
from scalselect_assets.method.interrupts import deferred
from scalselect_assets.operations.cleaning import clean
from scalselect_assets.operations.faults import RefreshError
from scalselect_assets.operations.leftovers import DEFAULT_RETENTION_DAYS, NAME
from scalselect_assets.operations.refresh import Refresh
from scalselect_assets.operations.sensors import STARTING_SECONDS, UNFINISHED
from scalselect_assets.resources.locks import StoreBusyError
from scalselect_assets.resources.progress import Progress
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource


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
            selection.key(receipts.NAME),
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


class RefreshConfig(dg.Config):
    """What a person may ask of one refresh."""

    accept_missing_images: bool = Field(
        default=False,
        description="Agree that images that are missing are gone, so that their rows give up their vectors.",
    )


def refresh_job(selection: Selection) -> dg.JobDefinition:
    """The refresh as a job, for the UI and for schedules."""

    @dg.op(
        name=selection.job_name("refresh_op"),
        description="Materialize exactly what is stale.",
        pool=device_pool.DEVICE_POOL,
    )
    def refresh_op(
        context: dg.OpExecutionContext,
        config: RefreshConfig,
        storage: StorageResource,
        vlm: VlmResource,
        progress: dg.ResourceParam[Progress],
    ) -> None:
        _require_pool_by_run(context.instance)

        @deferred()
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
            accept_missing_images=config.accept_missing_images,
            should_stop=stopped,
        ).run()
        n_embedded, n_failed = len(report.embedded), len(report.failed)
        with deferred():
            context.log.info(f"{len(report.runs)} runs, {n_embedded} shards embedded, {n_failed} failed")
        if problems := report.problems():
            raise dg.Failure("\n".join(problems), allow_retries=False)

    @dg.job(
        name=selection.job_name("refresh"),
        executor_def=dg.in_process_executor,
        description="Find new, changed and removed shards and materialize exactly what is stale.",
    )
    def refresh() -> None:
        refresh_op()

    return refresh


@deferred()
def _require_pool_by_run(instance: dg.DagsterInstance) -> None:
    """A slot by op would be held by the refresh and waited for, in vain, by the embeddings that it makes.

    Raises:
        RefreshError: That is how the instance is configured.
    """
    pools = instance.get_concurrency_config().pool_config
    limited = pools.default_pool_limit is not None or any(
        limit.name == device_pool.DEVICE_POOL for limit in instance.event_log_storage.get_pool_limits()
    )
    by_run = pools.pool_granularity is not None and pools.pool_granularity.value == "run"
    if limited and not by_run:
        raise RefreshError(
            f"the pool {device_pool.DEVICE_POOL} has a limit by op, which a refresh would wait for "
            "while it holds it; set `concurrency: pools: granularity: run` in the instance's dagster.yaml"
        )


def nightly_schedule(selection: Selection) -> dg.ScheduleDefinition:
    """The refresh, night by night; off until a person turns it on.

    Dagster launches it once per tick of the cron. A tick that finds another refresh at work is skipped, and
    says so; a refresh that finds nothing stale makes no further run.
    """

    @dg.schedule(
        name=selection.job_name("nightly_rescoring"),
        job_name=selection.job_name("refresh"),
        cron_schedule=selection.nightly_cron,
        execution_timezone=selection.nightly_timezone,
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Embed what is new or changed since the last time, rescore the pool, select again.",
    )
    def nightly_rescoring(
        context: dg.ScheduleEvaluationContext, storage: StorageResource
    ) -> dg.RunRequest | dg.SkipReason:
        at_work = _refresh_at_work(selection, context.instance, storage)
        return dg.SkipReason(f"{at_work}; the next tick looks again") if at_work else dg.RunRequest()

    return nightly_rescoring


def _refresh_at_work(
    selection: Selection, instance: dg.DagsterInstance, storage: StorageResource
) -> str | None:
    """Who refreshes the selection now, or is about to; nobody where only the record of a dead run says so."""
    records = instance.get_run_records(
        dg.RunsFilter(job_name=selection.job_name("refresh"), statuses=list(UNFINISHED))
    )
    told = {
        record.dagster_run.run_id: f"run {record.dagster_run.run_id} of {record.dagster_run.job_name} is "
        f"{UNFINISHED[record.dagster_run.status]}"
        for record in records
    }
    try:
        with storage.locks(selection.store).refreshing():
            pass
    except StoreBusyError as error:
        return next(iter(told.values()), str(error))
    now = time.time()
    for record in records:
        # A run without the lock waits for its turn, is about to take it, or is dead. Dagster ends dead ones
        # where its launcher can look after runs; elsewhere, after a power cut, they stay so for ever.
        waiting = record.dagster_run.status is dg.DagsterRunStatus.QUEUED
        starting = now - record.update_timestamp.timestamp() < STARTING_SECONDS
        if waiting or starting or instance.run_launcher.supports_check_run_worker_health:
            return told[record.dagster_run.run_id]
    return None
