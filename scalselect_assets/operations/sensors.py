"""The two sensors of a declarative selection: discovery of shards, and evaluation of conditions."""

from typing import Final

import dagster as dg

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import reuse
from scalselect_assets.embedding.device_pool import limit_devices
from scalselect_assets.operations.automation import AUTOMATION_TAG
from scalselect_assets.pool.discovery import discover, report_discovery
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.storage import StorageResource

UNFINISHED: Final = {
    dg.DagsterRunStatus.QUEUED: "queued",
    dg.DagsterRunStatus.NOT_STARTED: "about to start",
    dg.DagsterRunStatus.STARTING: "about to start",
    dg.DagsterRunStatus.STARTED: "in progress",
    dg.DagsterRunStatus.CANCELING: "being canceled",
}
STARTING_SECONDS = 600.0  # importing everything on a busy machine takes less


def automation_sensors(selection: Selection) -> list[dg.SensorDefinition]:
    """The sensors of a declarative selection: one discovers shards, the other evaluates the conditions."""
    return [
        discovery_sensor(selection),
        dg.AutomationConditionSensorDefinition(
            selection.job_name("automation"),
            target=dg.AssetSelection.groups(selection.name),
            run_tags={AUTOMATION_TAG: selection.name},
            default_status=dg.DefaultSensorStatus.STOPPED,
            minimum_interval_seconds=selection.automation_seconds,
            description="Materialize what has changed and then, in order, everything that depends on it.",
            # A backfill would start up to half a minute later, and Dagster would see its end as much later.
            emit_backfills=False,
        ),
    ]


def discovery_sensor(selection: Selection) -> dg.SensorDefinition:
    """The sensor that reports new, changed and removed shards to Dagster; it requests no run."""

    @dg.sensor(
        name=selection.job_name("discovery"),
        minimum_interval_seconds=selection.automation_seconds,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Find new, changed and removed shards.",
    )
    def discovery(context: dg.SensorEvaluationContext, storage: StorageResource) -> dg.SkipReason:
        limit_devices(context.instance)  # before a run of the first shard is requested
        artifacts = storage.artifacts(selection.store)
        source = selection.open_pool(storage)
        found = discover(source, artifacts, selection.settle_seconds)
        if not found.versions:
            # A file system that is not mounted looks like a pool without shards.
            return dg.SkipReason(f"no shard in {selection.source} can be read now; Dagster keeps its shards")
        # Dagster would store events that a sensor returns before the partitions that they belong to.
        added, removed = report_discovery(selection, context.instance, found)
        for shard in removed:
            reuse.forget(artifacts, shard)
        state = digest(dict(found.versions))
        counts = f"{len(found.versions)} shards, {len(found.unsettled)} still being written"
        if state == context.cursor and not added and not removed:
            return dg.SkipReason(f"nothing has changed: {counts}")
        context.update_cursor(state)
        return dg.SkipReason(f"reported {len(added)} new and {len(removed)} removed shards: {counts}")

    return discovery
