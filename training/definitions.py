"""The training team's code location: a `training_run` for every declared selection.

It finds selections in the same way as the first location (`definitions.py`), so that one setting,
SCALSELECT_SELECTIONS, serves both. Results are written to `./.training`, or to the folder that TRAINING_RUNS
names. A team in another repository writes ``build("<name>", "<store>")`` itself.
"""

import os

import dagster as dg

from scalselect_assets.deployment import declared_selections
from training.asset import TrainingRuns, build

defs: dg.Definitions = dg.Definitions.merge(
    *(build(selection.name, selection.store) for selection in declared_selections()),
    dg.Definitions(
        resources={"training_runs": TrainingRuns(folder=os.environ.get("TRAINING_RUNS", ".training"))},
        sensors=[
            dg.AutomationConditionSensorDefinition(
                "training_automation",
                target=dg.AssetSelection.groups("training"),
                default_status=dg.DefaultSensorStatus.STOPPED,
                description="Train when a selection has new rows.",
            )
        ],
        # Each run is a process already; another one for each step would import torch again.
        executor=dg.in_process_executor,
    ),
)
