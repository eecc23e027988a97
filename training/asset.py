"""The asset `training_run`: a model tuned on one exact version of a selection, with a record of the training.

The asset depends on assets of another code location by their keys alone. Dagster draws the lineage across
locations because the keys are the same, and records in each materialization the versions of both parents.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field
from upath import UPath

from scalselect_assets.recording.records import Records, RunRecords
from training.plots import loss_curve
from training.recipe import Recipe
from training.training_data import TrainingData, TrainingDataError, read_manifest, read_training_data

if TYPE_CHECKING:
    from training.result import Result

NAME = "training_run"
CODE_VERSION = "1"
DEVICE_POOL = "training_device"
"""Dagster's device pool for runs that train; its limit in the instance is the number of devices."""

EXTRA = (
    "pip install 'scalselect-dagster[training]' "
    "(in a checkout: pip install -c constraints.txt -e '.[training]')"
)
_RECORDED_VERSION = "dataset_version"


class TrainingRuns(dg.ConfigurableResource):
    """The folder of the results, and access to the outputs of selections."""

    folder: str = Field(default=".training", description="Local folder; each selection has a subfolder.")
    fsspec_options: dict[str, str] = Field(
        default={}, description="Storage options of fsspec for stores and images that are not local."
    )

    def of(self, selection: str) -> Path:
        """The folder of one selection's results."""
        return Path(self.folder).expanduser().absolute() / selection

    def outputs(self, store: str) -> UPath:
        """The `training_dataset` folder of the selection that keeps its results at ``store``."""
        return UPath(store, **(self.fsspec_options if "://" in store else {})) / "training_dataset"


def automation_condition(dataset: dg.AssetKey) -> dg.AutomationCondition[Any]:
    """A training is due when the training dataset has a new version, or when there is no training yet.

    A refresh that leaves the rows unchanged makes no training due, however often it runs. A finished training
    does not reset the condition, because a run in progress has read the version before; only a request does.
    So a version that somebody trained on by hand is requested once more, and that run finds the result and
    ends at once.
    """
    condition = dg.AutomationCondition
    new_rows = condition.asset_matches(dataset, condition.data_version_changed())
    due = (new_rows | condition.newly_missing()).since(condition.newly_requested()).with_label("new rows")
    busy = condition.asset_matches(dataset, condition.missing() | condition.in_progress())
    return due & ~condition.in_progress() & ~busy


def build(selection: str, store: str) -> dg.Definitions:
    """The training run of one selection with its checks.

    Args:
        selection: Name of the selection, which prefixes the asset keys.
        store: Folder or URI of the selection's results.
    """
    subset, dataset = (
        dg.AssetKey([selection, "selected_subset"]),
        dg.AssetKey([selection, "training_dataset"]),
    )
    key = dg.AssetKey([selection, NAME])

    @dg.asset(
        key=key,
        # Assets of another code location: this one neither has nor needs their definitions.
        deps=[subset, dataset],
        group_name="training",
        kinds={"huggingface", "pytorch"},
        code_version=CODE_VERSION,
        pool=DEVICE_POOL,
        automation_condition=automation_condition(dataset),
        check_specs=[
            dg.AssetCheckSpec(
                "loss_goes_down",
                asset=key,
                description="The mean loss over the last fifth of the curve is below that over the first.",
            ),
            dg.AssetCheckSpec(
                "every_row_is_trained_on",
                asset=key,
                description="No row of the training file had to be left out.",
            ),
        ],
    )
    def training_run(
        context: dg.AssetExecutionContext, config: Recipe, training_runs: TrainingRuns
    ) -> dg.MaterializeResult:
        """The target model, fine-tuned on the selected subset."""
        return train(context, config, training_runs, selection, store)

    @dg.asset_check(
        asset=key,
        description="The subset still has the rows that the model was trained on.",
    )
    def trained_on_the_present_subset(
        context: dg.AssetCheckExecutionContext, training_runs: TrainingRuns
    ) -> dg.AssetCheckResult:
        return compare_with_present(context.instance, key, training_runs.outputs(store))

    return dg.Definitions(assets=[training_run], asset_checks=[trained_on_the_present_subset])


def train(
    context: dg.AssetExecutionContext, config: Recipe, runs: TrainingRuns, selection: str, store: str
) -> dg.MaterializeResult:
    """Fine-tune the target model on the rows of a store's training dataset.

    Raises:
        dg.Failure: The dataset, the recipe or the model cannot be used; trying again would not help.
    """
    _require_the_extra()
    from scalselect_assets.method.representation.loading import ModelLoadError
    from training.fine_tuning import TrainingError, fine_tune

    log = RunRecords(context).log.info
    try:
        data = read_training_data(runs.outputs(store))
        log(f"{len(data.rows)} rows of version {data.version}, verified")
        result = fine_tune(data, config, runs.of(selection), log, runs.fsspec_options)
    except (TrainingDataError, TrainingError, ModelLoadError) as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    first, last = result.fell()
    return dg.MaterializeResult(
        data_version=dg.DataVersion(result.data_version),
        metadata={**_versions(data), **_outcome(result, config)},
        check_results=[
            dg.AssetCheckResult(
                check_name="loss_goes_down",
                passed=last < first,
                severity=dg.AssetCheckSeverity.WARN,
                metadata={"first_fifth": first, "last_fifth": last},
            ),
            dg.AssetCheckResult(
                check_name="every_row_is_trained_on",
                passed=not result.left_out,
                severity=dg.AssetCheckSeverity.WARN,
                metadata={"rows_trained_on": result.rows, "rows_left_out": result.left_out},
            ),
        ],
    )


def compare_with_present(
    instance: dg.DagsterInstance, key: dg.AssetKey, outputs: UPath
) -> dg.AssetCheckResult:
    """Compare the version that the last run was trained on with the store's present one.

    Raises:
        dg.Failure: The store's manifest cannot be read.
    """
    materialization = Records(instance).latest_materialization(key)
    trained = materialization.metadata[_RECORDED_VERSION].value if materialization else None
    try:
        present = read_manifest(outputs)["data_version"]
    except TrainingDataError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    return dg.AssetCheckResult(
        passed=trained == present,
        severity=dg.AssetCheckSeverity.WARN,
        description="" if trained == present else f"materialize {NAME} to train on the present rows",
        metadata={"trained_on": str(trained), "present": present},
    )


def _require_the_extra() -> None:
    """Check for the packages that only training needs; the location loads without them.

    Raises:
        dg.Failure: They are not installed.
    """
    if missing := [name for name in ("accelerate", "peft") if find_spec(name) is None]:
        raise dg.Failure(
            f"training needs {' and '.join(missing)}, not installed here: {EXTRA}", allow_retries=False
        )


def _versions(data: TrainingData) -> dict[str, Any]:
    """The versions of everything that the model was trained on."""
    manifest = data.manifest
    return {
        "subset_version": data.subset_version,
        _RECORDED_VERSION: data.version,
        "dataset_provenance": manifest["provenance"],
        "basis_version": manifest["basis_version"],
        "training_file_sha256": data.training_file_sha256,
        "target_model": data.model["model"],
        "target_model_revision": data.model["commit"] or data.model["revision"] or "none: a local folder",
        "model_fingerprint": data.model["fingerprint"],
    }


def _outcome(result: "Result", recipe: Recipe) -> dict[str, Any]:
    """The outcome of a training; Dagster plots the plain numbers over time."""
    return {
        "loss_curve": loss_curve(result.losses, result.resumed_from),
        "first_loss": result.losses[0][1],
        "last_loss": result.losses[-1][1],
        "steps": result.steps,
        "resumed_from_step": result.resumed_from,
        "rows": result.rows,
        "tokens": result.tokens,
        "rows_left_out": sum(result.left_out.values()),
        "rows_left_out_by_reason": result.left_out,
        "trained_parameters": sum(result.trained_parameters.values()),
        "trained_parts": result.trained_parameters,
        "frozen_parts": result.frozen_parameters,
        "seconds": result.seconds,
        "trained_now": result.made_now,
        "seed": recipe.seed,
        "recipe": {**recipe.model_dump(), "learning_rate": recipe.highest_learning_rate},
        "base_weights_sha256": result.base_weights_sha256,
        "packages": result.packages,
        "model": dg.MetadataValue.path(str(result.model_folder)),
        "dagster/uri": str(result.folder),
    }
