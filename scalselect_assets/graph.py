"""One selection's graph: its sources, the seven assets of the path, their jobs and the nightly schedule."""

from importlib import import_module

import dagster as dg

from scalselect_assets import ASSET_MODULES, subspace_basis
from scalselect_assets.refresh import refresh_job, source_assets
from scalselect_assets.selection import Selection


def selection_defs(selection: Selection) -> dg.Definitions:
    """Everything that Dagster holds of one selection, except the resources, which a deployment shares."""
    assets: list[dg.AssetsDefinition] = [
        import_module(f"scalselect_assets.{name}").build(selection) for name in ASSET_MODULES
    ]
    return dg.Definitions(
        assets=[*source_assets(selection), *assets],
        jobs=[
            dg.define_asset_job(
                selection.job_name("assets"),
                selection=dg.AssetSelection.assets(*assets),
                description="Any assets of this selection in one process; what the refresh runs.",
                executor_def=dg.in_process_executor,
            ),
            refresh_job(selection),
            subspace_basis.verify_job(selection),
        ],
        schedules=[selection.nightly_schedule(selection.job_name("refresh"))],
    )
