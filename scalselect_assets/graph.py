"""The graph of one selection: its sources, the assets of the path, jobs, and schedule or sensors."""

import warnings
from collections.abc import Sequence

import dagster as dg

from scalselect_assets.asset_path import path_of
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.operations.automation import automation_condition
from scalselect_assets.operations.jobs import maintenance_job, nightly_schedule, refresh_job
from scalselect_assets.operations.sensors import automation_sensors
from scalselect_assets.pool.discovery import source_assets
from scalselect_assets.subspace import verification


def selection_defs(selection: Selection) -> dg.Definitions:
    """All definitions of one selection except the resources, which a deployment shares."""
    with warnings.catch_warnings():
        # In Dagster, backfills in one run and observed sources are beta, and checks by partition a preview.
        warnings.simplefilter("ignore", dg.BetaWarning)
        warnings.simplefilter("ignore", dg.PreviewWarning)
        sources, assets = source_assets(selection), _assets(selection)
    declarative = selection.is_declarative
    return dg.Definitions(
        assets=[*sources, *assets],
        jobs=[
            dg.define_asset_job(
                selection.job_name("assets"),
                selection=dg.AssetSelection.assets(*assets),
                description="Any assets of this selection in one process; the refresh runs it.",
                executor_def=dg.in_process_executor,
            ),
            *([] if declarative else [refresh_job(selection)]),
            verification.verify_job(selection),
            maintenance_job(selection),
        ],
        schedules=[] if declarative else [nightly_schedule(selection)],
        sensors=automation_sensors(selection) if declarative else [],
    )


def _assets(selection: Selection) -> Sequence[dg.AssetsDefinition]:
    """The assets of the path, each with the condition on which Dagster requests it, if any."""
    built: list[dg.AssetsDefinition] = [asset.build(selection) for asset in path_of(selection)]
    # A condition depends on the whole path, so the asset modules do not set their own.
    return dg.map_asset_specs(
        lambda spec: spec.replace_attributes(
            automation_condition=automation_condition(selection, spec.key.path[-1])
        ),
        built,
    )
