"""The jobs and the schedule of a selection: refresh, nightly rescoring, cleaning."""

import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import dagster as dg
from pydantic import Field

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import device_pool, receipts
from scalselect_assets.operations.cleaning import clean
from scalselect_assets.operations.faults import RefreshError
from scalselect_assets.operations.leftovers import DEFAULT_RETENTION_DAYS, NAME
from scalselect_assets.operations.refresh import Refresh
from scalselect_assets.operations.sensors import STARTING_SECONDS, UNFINISHED
from scalselect_assets.recording.records import Records, RunRecords
from scalselect_assets.resources.locks import StoreBusyError
from scalselect_assets.resources.progress import Progress
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource


class MaintenanceConfig(dg.Config):
    """The settings of one cleaning."""

    retention_days: float = Field(
        default=DEFAULT_RETENTION_DAYS,
        ge=0,
        description="How many days a thing must have been unneeded before it is deleted.",
    )
    dry_run: bool = Field(default=False, description="Delete nothing, and report what would be deleted.")


def maintenance_job(selection: Selection) -> dg.JobDefinition:
    """The job that cleans the store.

    Its report is an observation of the embeddings, since they take up most of a store.
    """

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
        RunRecords(context).log_event(
            dg.AssetObservation(
                selection.key(receipts.NAME),
                metadata={
                    "bytes_freed": report.bytes_freed,
                    "retention_days": config.retention_days,
                    "dry_run": report.dry_run,
                    "removed": _table(report.removed_by_kind()),
                    "kept": _table(report.kept_by_reason()),
                },
            )
        )

    @dg.job(
        name=selection.job_name(NAME),
        executor_def=dg.in_process_executor,
        description="Delete what nothing has needed for the retention time: leftovers of killed processes, "
        "shards that left the pool, tables of other models, old table versions. Nobody else can work on the "
        "store meanwhile.",
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
    """The settings of one refresh."""

    accept_missing_images: bool = Field(
        default=False,
        description="Accept that missing images are gone for good, so that their rows lose their vectors.",
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
        records = RunRecords(context)
        _require_pool_by_run(records)
        report = Refresh(
            selection,
            job=context.repository_def.get_job(selection.job_name("assets")),
            instance=context.instance,
            storage=storage,
            vlm=vlm,
            progress=progress,
            log=records.log,
            accept_missing_images=config.accept_missing_images,
            should_stop=partial(records.is_being_stopped, context.run_id),
        ).run()
        n_embedded, n_failed = len(report.embedded), len(report.failed)
        records.log.info(f"{len(report.runs)} runs, {n_embedded} shards embedded, {n_failed} failed")
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


def _require_pool_by_run(records: Records) -> None:
    """Make sure that a limit of the device pool counts runs.

    With a limit per op, the refresh would hold the only slot while its own embedding runs wait for it: a
    deadlock.

    Raises:
        RefreshError: The instance limits the device pool by op.
    """
    if records.is_limited_by_op(device_pool.DEVICE_POOL):
        raise RefreshError(
            f"the device pool {device_pool.DEVICE_POOL} has a limit by op: a refresh would wait for a slot "
            "that it holds itself; set `concurrency: pools: granularity: run` in the instance's dagster.yaml"
        )


def nightly_schedule(selection: Selection) -> dg.ScheduleDefinition:
    """The schedule that refreshes a selection every night; it is off until a person turns it on.

    Dagster launches the refresh once per tick of the cron. A tick that finds another refresh at work is
    skipped with a message; a refresh that finds nothing stale makes no further run.
    """

    @dg.schedule(
        name=selection.job_name("nightly_rescoring"),
        job_name=selection.job_name("refresh"),
        cron_schedule=selection.nightly_cron,
        execution_timezone=selection.nightly_timezone,
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Embed what is new or changed since the last refresh, rescore the pool, select again.",
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
    """A message that names the refresh at work or about to start; None if there is none.

    The record of a run whose process is dead does not count.
    """
    records = Records(instance)
    unfinished = records.runs(
        dg.RunsFilter(job_name=selection.job_name("refresh"), statuses=list(UNFINISHED))
    )
    described = {
        record.dagster_run.run_id: f"run {record.dagster_run.run_id} of {record.dagster_run.job_name} is "
        f"{UNFINISHED[record.dagster_run.status]}"
        for record in unfinished
    }
    try:
        with storage.locks(selection.store).refreshing():
            pass
    except StoreBusyError as error:
        return next(iter(described.values()), str(error))
    now, dead_runs_end = time.time(), records.ends_dead_runs()
    for record in unfinished:
        # A run without the lock waits for its turn, is about to take the lock, or is dead. Dagster ends dead
        # runs where its launcher can check them; elsewhere, after a power cut, they stay unfinished for ever.
        waiting = record.dagster_run.status is dg.DagsterRunStatus.QUEUED
        starting = now - record.update_timestamp.timestamp() < STARTING_SECONDS
        if waiting or starting or dead_runs_end:
            return described[record.dagster_run.run_id]
    return None
