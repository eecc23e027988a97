"""The asset `training_run`: a model tuned on one exact version of a selection, and what was recorded of it.

It depends on assets of another code location by their keys alone. Dagster draws the lineage across locations
because the keys are the same; it records in each materialization which versions of both it was made from.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field
from upath import UPath

from scalselect_assets.method.interrupts import deferred
from training.exports import Export, ExportError, read_export, read_manifest
from training.plots import loss_curve
from training.recipe import Recipe

if TYPE_CHECKING:
    from training.fine_tuning import Result

NAME = "training_run"
CODE_VERSION = "1"
DEVICE_POOL = "training_device"
"""Runs that train count in this pool; its limit in the instance is the number of devices (see the docs)."""

EXTRA = (
    "pip install 'scalselect-dagster[training]' "
    "(in a checkout: pip install -c constraints.txt -e '.[training]')"
)
_RECORDED_VERSION = "dataset_version"


class TrainingRuns(dg.ConfigurableResource):
    """Where results are kept, and how the outputs of selections are reached."""

    folder: str = Field(default=".training", description="Local folder; each selection has its own in it.")
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
    """Due when there is a new version of the training dataset, or nothing was trained yet.

    A refresh that leaves the rows as they were, however often, makes nothing due. Being trained is no end of
    it: a run in progress has read the version before. One request more, for a version that somebody trained
    on by hand, finds the result and ends at once.
    """
    condition = dg.AutomationCondition
    new_rows = condition.asset_matches(dataset, condition.data_version_changed())
    due = (new_rows | condition.newly_missing()).since(condition.newly_requested()).with_label("new rows")
    busy = condition.asset_matches(dataset, condition.missing() | condition.in_progress())
    return due & ~condition.in_progress() & ~busy


def build(selection: str, store: str) -> dg.Definitions:
    """The training run of one selection with its checks.

    Args:
        selection: Its name, which prefixes the asset keys.
        store: Where it keeps its results: a folder or a URI.
    """
    subset, dataset = (
        dg.AssetKey([selection, "selected_subset"]),
        dg.AssetKey([selection, "training_dataset"]),
    )
    key = dg.AssetKey([selection, NAME])

    @dg.asset(
        key=key,
        # Of another code location: this one neither has nor needs their definitions.
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
        _require_the_extra()
        from scalselect_assets.method.representation.loading import ModelLoadError
        from training.fine_tuning import TrainingError, fine_tune

        tell = deferred()(context.log.info)
        # All three errors say what to do; trying again would not help.
        try:
            export = read_export(training_runs.outputs(store))
            tell(f"{len(export.rows)} rows of version {export.version}, verified")
            result = fine_tune(
                export, config, training_runs.of(selection), tell, training_runs.fsspec_options
            )
        except (ExportError, TrainingError, ModelLoadError) as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        first, last = result.fell()
        return dg.MaterializeResult(
            data_version=dg.DataVersion(result.data_version),
            metadata={**_versions(export), **_outcome(result, config)},
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

    @dg.asset_check(
        asset=key,
        description="The subset has not been made anew, with other rows, since the model was trained.",
    )
    def trained_on_the_present_subset(
        context: dg.AssetCheckExecutionContext, training_runs: TrainingRuns
    ) -> dg.AssetCheckResult:
        event = context.instance.get_latest_materialization_event(key)
        materialization = event.asset_materialization if event else None
        trained = materialization.metadata[_RECORDED_VERSION].value if materialization else None
        try:
            present = read_manifest(training_runs.outputs(store))["data_version"]
        except ExportError as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        return dg.AssetCheckResult(
            passed=trained == present,
            severity=dg.AssetCheckSeverity.WARN,
            description="" if trained == present else f"materialize {NAME} to train on the present rows",
            metadata={"trained_on": str(trained), "present": present},
        )

    return dg.Definitions(assets=[training_run], asset_checks=[trained_on_the_present_subset])


def _require_the_extra() -> None:
    """The location loads without the packages that only training needs.

    Raises:
        dg.Failure: They are not installed.
    """
    if missing := [name for name in ("accelerate", "peft") if find_spec(name) is None]:
        raise dg.Failure(
            f"training needs {' and '.join(missing)}, not installed here: {EXTRA}", allow_retries=False
        )


def _versions(export: Export) -> dict[str, Any]:
    """What exactly it was trained on."""
    manifest = export.manifest
    return {
        "subset_version": export.subset_version,
        _RECORDED_VERSION: export.version,
        "dataset_provenance": manifest["provenance"],
        "basis_version": manifest["basis_version"],
        "training_file_sha256": export.training_file_sha256,
        "target_model": export.model["model"],
        "target_model_revision": export.model["commit"] or export.model["revision"] or "none: a local folder",
        "model_fingerprint": export.model["fingerprint"],
    }


def _outcome(result: "Result", recipe: Recipe) -> dict[str, Any]:
    """What came out; plain numbers are those that Dagster plots over time."""
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
