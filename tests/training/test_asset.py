"""The code location: it hangs on another location's assets by key, and records what it trained on."""

import importlib.util
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from tests.bench import Bench
from tests.conftest import ROOT, RunPython, sharegpt_row
from tests.training.conftest import ROWS, Outputs
from training.asset import EXTRA, TrainingRuns, build

pytestmark = pytest.mark.usefixtures("one_torch_thread")

KEY = dg.AssetKey(["bench", "training_run"])
DATASET = dg.AssetKey(["bench", "training_dataset"])
FEW = {"max_steps": 10, "batch_size": 2, "learning_rate": 1e-3, "device": "cpu"}

trains = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("accelerate", "peft")),
    reason="the extra `training` is not installed",
)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def report(instance: dg.DagsterInstance, asset: str, version: str) -> None:
    """What the selection's location tells Dagster."""
    event = dg.AssetMaterialization(dg.AssetKey(["bench", asset]), tags={"dagster/data_version": version})
    instance.report_runless_asset_event(event)


def materialize(
    outputs: Outputs, runs: Path, instance: dg.DagsterInstance, **config: Any
) -> dg.ExecuteInProcessResult:
    defs = build("bench", outputs.selection.store)
    return dg.materialize(
        [*(defs.assets or ()), *(defs.asset_checks or ())],  # type: ignore[list-item]
        instance=instance,
        resources={"training_runs": TrainingRuns(folder=str(runs))},
        run_config=dg.RunConfig({KEY.to_python_identifier(): {"config": {**FEW, **config}}}),
        raise_on_error=False,
    )


def failure(result: dg.ExecuteInProcessResult) -> str:
    (step,) = (event for event in result.all_events if event.is_step_failure)
    return str(step.step_failure_data.user_failure_data.description)


def checks(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    return {check.check_name: check for check in result.get_asset_check_evaluations()}


def declared(made: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> dg.Definitions:
    """The code location where selections of these names are declared."""
    for name in names:
        (folder / f"{name}.yaml").write_text(made.selection.model_copy(update={"name": name}).to_yaml())
    monkeypatch.setenv("SCALSELECT_SELECTIONS", str(folder))
    defs: dg.Definitions = runpy.run_module("training.definitions")["defs"]
    return defs


def test_it_loads_light_without_a_selection_and_without_the_extra(
    fresh_python: RunPython, tmp_path: Path
) -> None:
    (tmp_path / "none").mkdir()
    blocked = "".join(f"sys.modules['{name}'] = None; " for name in ("accelerate", "peft"))
    finished = fresh_python(
        "-c",
        f"import sys; {blocked}from training.definitions import defs; "
        "import dagster as dg; dg.Definitions.validate_loadable(defs); "
        "print(len(defs.resolve_asset_graph().materializable_asset_keys), "
        "sorted({'torch', 'transformers', 'lancedb'} & set(sys.modules)))",
        SCALSELECT_SELECTIONS=str(tmp_path / "none"),
    )
    assert finished.stdout.strip() == "0 []", finished.stderr


def test_each_declared_selection_has_a_run_that_hangs_on_its_outputs(
    made: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = declared(made, tmp_path, monkeypatch, "one", "two").resolve_asset_graph()
    assert {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.materializable_asset_keys
    } == {
        f"{name}/training_run": {f"{name}/selected_subset", f"{name}/training_dataset"}
        for name in ("one", "two")
    }


def test_nothing_trains_by_itself_until_a_person_turns_it_on(
    made: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = declared(made, tmp_path, monkeypatch, "one").get_repository_def()
    assert {sensor.name: sensor.default_status for sensor in repository.sensor_defs} == {
        "training_automation": dg.DefaultSensorStatus.STOPPED
    }
    assert not repository.schedule_defs


@trains
def test_it_records_exactly_what_it_trained_on(
    made: Bench, outputs: Outputs, tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    data = outputs.read()
    report(instance, "selected_subset", data.subset_version)
    report(instance, "training_dataset", data.version)
    result = materialize(outputs, tmp_path / "runs", instance)
    assert result.success
    (event,) = result.asset_materializations_for_node(KEY.to_python_identifier())
    found = {name: value.value for name, value in event.metadata.items()}
    assert found["subset_version"] == made.metadata("selected_subset")["scalselect/data_version"]
    assert found["dataset_version"] == made.metadata("training_dataset")["scalselect/data_version"]
    assert found["dataset_provenance"] == made.metadata("training_dataset")["scalselect/provenance"]
    assert found["basis_version"] == made.metadata("subspace_basis")["scalselect/data_version"]
    assert found["training_file_sha256"] == found["dataset_version"]
    assert found["model_fingerprint"] == outputs.manifest["model"]["fingerprint"]
    assert (found["rows"], found["rows_left_out"], found["seed"], found["steps"]) == (len(ROWS), 0, 0, 10)
    assert found["last_loss"] < found["first_loss"]
    assert found["packages"]["transformers"]
    assert found["loss_curve"].startswith("![loss ")
    assert (Path(found["model"]) / "config.json").exists()
    # Dagster's own record of the same: which versions of its parents it was made from.
    assert event.tags is not None
    for asset, version in (("selected_subset", data.subset_version), ("training_dataset", data.version)):
        assert event.tags[f"dagster/input_data_version/bench/{asset}"] == version
    passed = {name: check.passed for name, check in checks(result).items()}
    assert passed == {
        "loss_goes_down": True,
        "every_row_is_trained_on": True,
        "trained_on_the_present_subset": True,
    }


@trains
def test_a_model_that_the_subset_has_left_behind_is_reported(
    outputs: Outputs, tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    materialize(outputs, tmp_path / "runs", instance, max_steps=1)
    before = outputs.manifest["data_version"]
    outputs.write(ROWS[1:])
    defs = build("bench", outputs.selection.store)
    result = dg.materialize(
        [*(defs.assets or ()), *(defs.asset_checks or ())],  # type: ignore[list-item]
        instance=instance,
        resources={"training_runs": TrainingRuns(folder=str(tmp_path / "runs"))},
        selection=dg.AssetSelection.checks(dg.AssetCheckKey(KEY, "trained_on_the_present_subset")),
    )
    check = checks(result)["trained_on_the_present_subset"]
    assert not check.passed
    assert check.severity is dg.AssetCheckSeverity.WARN
    told = {name: value.value for name, value in check.metadata.items()}
    assert told == {"trained_on": before, "present": outputs.manifest["data_version"]}


@trains
def test_rows_left_out_and_a_loss_that_does_not_fall_are_warned_of(
    outputs: Outputs, tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    outputs.write([*ROWS, sharegpt_row("gone.png")])
    result = materialize(outputs, tmp_path / "runs", instance, max_steps=1)
    found = checks(result)
    assert result.success
    assert not found["every_row_is_trained_on"].passed
    assert not found["loss_goes_down"].passed  # one step has nothing to fall from
    assert {check.severity for check in found.values()} == {dg.AssetCheckSeverity.WARN}


@trains
def test_a_file_that_does_not_fit_its_manifest_is_not_trained_on(
    outputs: Outputs, tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    path = outputs.folder / "train.jsonl"
    path.write_text(path.read_text().replace("Hello", "Hallo"))
    result = materialize(outputs, tmp_path / "runs", instance)
    assert not result.success
    assert "its manifest says" in failure(result)
    assert not (tmp_path / "runs").exists()


def test_what_is_not_installed_is_named_with_the_extra_that_brings_it(
    outputs: Outputs, tmp_path: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.asset.find_spec", lambda _: None)
    result = materialize(outputs, tmp_path / "runs", instance)
    assert failure(result) == f"training needs accelerate and peft, not installed here: {EXTRA}"


def test_only_another_version_of_the_rows_makes_a_training_due(
    outputs: Outputs, instance: dg.DagsterInstance
) -> None:
    runs = dg.Definitions(resources={"training_runs": TrainingRuns()})
    defs = dg.Definitions.merge(build("bench", outputs.selection.store), runs)
    cursor = None

    def due() -> int:
        nonlocal cursor
        result = dg.evaluate_automation_conditions(defs, instance, cursor=cursor)
        cursor = result.cursor
        return result.total_requested

    def trained() -> None:
        instance.report_runless_asset_event(dg.AssetMaterialization(KEY))

    assert due() == 0  # there is nothing to train on
    report(instance, "training_dataset", "a")
    assert due() == 1  # the first time
    trained()
    assert due() == 0
    report(instance, "training_dataset", "a")
    assert due() == 0  # made again, with the same rows
    report(instance, "selected_subset", "other scores")
    assert due() == 0  # chosen by other scores, the same rows
    report(instance, "training_dataset", "b")
    assert due() == 1
    assert due() == 0  # requested already
    report(instance, "training_dataset", "c")
    assert due() == 1  # while it was trained on b
    trained()
    assert due() == 0


def test_the_first_location_knows_nothing_of_the_second() -> None:
    for folder in ("scalselect_assets", "resources"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"^\s*(from|import) training\b", path.read_text(), re.MULTILINE), path
