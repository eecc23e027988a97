"""The code location: it loads light, from declarations, and keeps the layers apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from scalselect_assets import ASSET_MODULES
from scalselect_assets.component import SelectionComponent
from scalselect_assets.dataset import training_manifest
from scalselect_assets.declaration.selection import DECLARATION_TYPE, Selection
from scalselect_assets.declaration.selection_file import SelectionFileError, read_selection
from scalselect_assets.deployment import build_defs, declared_selections
from scalselect_assets.operations.automation import automation_condition
from scalselect_assets.resources.identity import digest
from scalselect_assets.subspace.subspace_basis import provenance, version
from tests.conftest import RunPython

EARLIER_TYPE = "scalselect_assets.selection.Selection"
"""Stands in stores of earlier releases, so it stays although the class has moved."""


def selection(name: str = "pool", **more: object) -> Selection:
    return Selection(name=name, source="/pool", store="/store", target_model="org/model", **more)  # type: ignore[arg-type]


@pytest.fixture
def imported_by(fresh_python: RunPython) -> Callable[..., set[str]]:
    """All modules that a statement imports in a process of its own."""

    def run(statement: str, **environment: str) -> set[str]:
        finished = fresh_python("-c", f"{statement}; import sys; print(' '.join(sys.modules))", **environment)
        assert finished.returncode == 0, finished.stderr
        return set(finished.stdout.splitlines()[-1].split())

    return run


def test_definitions_load_without_torch_transformers_or_lancedb(
    imported_by: Callable[..., set[str]], tmp_path: Path
) -> None:
    (tmp_path / "one.yaml").write_text(selection(near_duplicates={}).to_yaml())
    modules = imported_by(
        "from definitions import defs; assert len(defs.resolve_asset_graph().get_all_asset_keys()) == 11",
        SCALSELECT_SELECTIONS=str(tmp_path),
    )
    assert not modules & {"torch", "transformers", "lancedb"}


def test_the_method_loads_without_dagster_polars_or_lancedb(imported_by: Callable[..., set[str]]) -> None:
    modules = imported_by(
        "import scalselect_assets.method.representation.encoder, scalselect_assets.method.subspace.leverage, "
        "scalselect_assets.method.choice.choose"
    )
    assert not modules & {"dagster", "polars", "lancedb", "upath", "scalselect_assets.resources"}


def test_the_graph_is_the_documented_path() -> None:
    graph = build_defs([selection(near_duplicates={})]).resolve_asset_graph()
    parents = {
        key.path[-1]: sorted(parent.path[-1] for parent in graph.get(key).parent_keys)
        for key in graph.get_all_asset_keys()
    }
    assert parents == {
        "shard_files": [],
        "shard_manifest": [],
        "raw_samples": ["shard_files"],
        "attention_embeddings": ["raw_samples"],
        "embedding_moments": ["attention_embeddings"],
        "subspace_basis": ["attention_embeddings", "embedding_moments", "shard_manifest"],
        "importance_scores": ["attention_embeddings", "subspace_basis"],
        "removed_samples": ["attention_embeddings", "importance_scores", "raw_samples", "subspace_basis"],
        "selected_subset": ["attention_embeddings", "importance_scores", "removed_samples", "subspace_basis"],
        "training_dataset": ["attention_embeddings", "selected_subset", "subspace_basis"],
        "selection_report": [
            "attention_embeddings",
            "importance_scores",
            "selected_subset",
            "subspace_basis",
            "training_dataset",
        ],
    }
    partitioned = {key.path[-1] for key in graph.get_all_asset_keys() if graph.get(key).is_partitioned}
    assert partitioned == {
        "shard_files",
        "raw_samples",
        "attention_embeddings",
        "embedding_moments",
        "importance_scores",
    }


def test_every_asset_says_what_it_is() -> None:
    graph = build_defs([selection("mine", near_duplicates={})]).resolve_asset_graph()
    for name in ASSET_MODULES:
        node = graph.get(dg.AssetKey(["mine", name]))
        assert node.group_name == "mine"
        assert node.kinds
        assert node.code_version
        assert node.description
        assert node.description.rstrip(".").count(". ") == 0, f"{name}: one sentence"
        schema = node.metadata["dagster/column_schema"]
        assert all(column.description for column in schema.columns)


def test_several_selections_share_a_deployment() -> None:
    defs = build_defs([selection("one"), selection("two")])
    keys = {tuple(key.path) for key in defs.resolve_asset_graph().get_all_asset_keys()}
    assert {("one", "selected_subset"), ("two", "selected_subset")} <= keys
    assert {"one_refresh", "two_refresh", "one_assets", "two_assets"} <= {
        job.name for job in defs.resolve_all_job_defs()
    }
    assert dg.Definitions.validate_loadable(defs) is None


def test_a_refreshed_selection_has_a_nightly_schedule_that_a_person_turns_on() -> None:
    defs = build_defs([selection("pool", nightly_cron="30 3 * * 1-5", nightly_timezone="Asia/Seoul")])
    schedule = defs.resolve_schedule_def("pool_nightly_rescoring")
    assert schedule.job_name == "pool_refresh"
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("30 3 * * 1-5", "Asia/Seoul")
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED
    assert drivers(defs) == {"pool_nightly_rescoring", "pool_refresh"}
    assert conditions(defs) == {None}


@pytest.mark.parametrize("automation", ["declarative", "declarative_nightly"])
def test_a_declarative_selection_has_two_sensors_that_a_person_turns_on(automation: str) -> None:
    defs = build_defs([selection("pool", automation=automation, automation_seconds=7)])
    for name in ("pool_discovery", "pool_automation"):
        sensor = defs.resolve_sensor_def(name)
        assert sensor.default_status is dg.DefaultSensorStatus.STOPPED
        assert sensor.minimum_interval_seconds == 7
    assert drivers(defs) == {"pool_discovery", "pool_automation"}
    assert None not in conditions(defs)
    assert all(condition.is_serializable for condition in conditions(defs))  # evaluated by the daemon
    assert dg.Definitions.validate_loadable(defs) is None


@pytest.mark.parametrize("automation", ["refresh", "declarative", "declarative_nightly"])
def test_assets_differ_between_the_ways_to_automate_in_their_conditions_only(automation: str) -> None:
    declared = selection("pool", automation=automation, near_duplicates={})
    assets = assets_by_name(declared)
    refreshed = assets_by_name(selection("pool", near_duplicates={}))
    assert set(assets) == set(ASSET_MODULES)
    for name, asset in assets.items():
        (spec,) = asset.specs
        assert spec.automation_condition == automation_condition(declared, name)
        (other,) = refreshed[name].specs
        assert spec.replace_attributes(automation_condition=None) == other
        for unchanged in (
            "check_specs_by_output_name",
            "backfill_policy",
            "partitions_def",
            "required_resource_keys",
        ):
            assert getattr(asset, unchanged) == getattr(refreshed[name], unchanged), f"{name}: {unchanged}"
        assert (asset.op.name, asset.op.pool) == (refreshed[name].op.name, refreshed[name].op.pool)
    # Dagster observes the sources and cannot request them.
    graph = build_defs([declared]).resolve_asset_graph()
    sources = graph.get_all_asset_keys() - graph.materializable_asset_keys
    assert {key.path[-1] for key in sources} == {"shard_files", "shard_manifest"}
    assert {graph.get(key).automation_condition for key in sources} == {None}


def assets_by_name(declared: Selection) -> dict[str, dg.AssetsDefinition]:
    assets = build_defs([declared]).get_repository_def().assets_defs_by_key
    return {key.path[-1]: asset for key, asset in assets.items()}


def drivers(defs: dg.Definitions) -> set[str]:
    """What could make a run by itself, and what such a run would be of."""
    repository = defs.get_repository_def()
    return {
        *(schedule.name for schedule in repository.schedule_defs),
        *(sensor.name for sensor in repository.sensor_defs),
        *({"pool_refresh"} & set(repository.job_names)),
    }


def conditions(defs: dg.Definitions) -> set[Any]:
    graph = defs.resolve_asset_graph()
    return {graph.get(key).automation_condition for key in graph.materializable_asset_keys}


@pytest.mark.parametrize(
    "wrong", [{"automation": "both"}, {"automation_seconds": 0}, {"automation": "eager"}]
)
def test_a_way_to_automate_that_there_is_not_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="automation"):
        selection("pool", **wrong)


@pytest.mark.parametrize("wrong", [{"nightly_cron": "at night"}, {"nightly_timezone": "Europe/Atlantis"}])
def test_a_time_that_never_comes_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="nightly_cron or nightly_timezone"):
        selection("pool", **wrong)


def test_a_declaration_survives_its_file(tmp_path: Path) -> None:
    declared = selection("2024", budget=100, text_only="keep", image_root="/a{{b}}", model_revision="1.0")
    (tmp_path / "selection.yaml").write_text(declared.to_yaml())
    assert read_selection(tmp_path / "selection.yaml") == declared
    assert isinstance(read_selection(tmp_path / "selection.yaml").budget, int)
    (tmp_path / "selection.yaml").write_text(declared.to_yaml(in_store=True))
    assert read_selection(tmp_path / "selection.yaml").store == str(tmp_path)


def test_relative_paths_of_a_declaration_start_at_its_file(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "type: scalselect_assets.component.SelectionComponent\n"
        "attributes: {name: a, source: pool, store: ./store, target_model: ./vlm, image_root: s3://bucket/i}\n"
    )
    (tmp_path / "vlm").mkdir()
    got = read_selection(tmp_path / "s.yaml")
    assert (got.source, got.store) == (str(tmp_path / "pool"), str(tmp_path / "store"))
    assert (got.target_model, got.image_root) == (str(tmp_path / "vlm"), "s3://bucket/i")


def test_a_retired_setting_is_read_where_it_changed_nothing_and_is_not_written_again(tmp_path: Path) -> None:
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    new.write_text(selection().to_yaml())
    assert "max_drift" not in new.read_text()
    old.write_text(f"{new.read_text()}  max_drift: 0.0\n")
    assert read_selection(old) == read_selection(new)
    assert read_selection(old).to_yaml() == new.read_text()
    with pytest.raises(ValueError, match="Remove the line max_drift"):  # by Dagster's own loader, too
        SelectionComponent.resolve_from_dict({**selection().model_dump(), "max_drift": 0.05})


def test_a_retired_setting_stays_in_the_hashes_that_stores_hold() -> None:
    declared = selection()
    basis = digest("subspace_basis", "2", {"basis": version(declared, {"a": "1"}), "max_drift": 0.0})
    assert provenance(declared, {"a": "1"}) == basis
    settings = {**declared.result_settings(), "max_drift": 0.0}
    del settings["exports"]
    inputs = {
        "settings": settings,
        "selected_subset": ["p", "v"],
        "subspace_basis": "b",
        "left_out": [],
    }
    expected = digest("training_dataset", "1", inputs)
    assert training_manifest.provenance(declared, "p", "v", "b", []) == expected


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ("{name: a, source: s, store: t}", "target_model"),
        ("{name: a, source: s, store: t, target_model: m, max_drift: 0.05}", "Remove the line max_drift"),
        ("{name: a, source: s, store: t, target_model: m, energy: 1.5}", "energy"),
        ("{name: a, source: s, store: t, target_model: m, budget: 0}", "budget"),
        ("{name: a, source: s, store: t, target_model: m, budget: 1.5}", "budget"),
        ("{name: 'a-b', source: s, store: t, target_model: m}", "name"),
        ("{name: a, source: s, store: t, target_model: m, buget: 3}", "buget"),
    ],
)
def test_a_wrong_declaration_names_the_file_and_the_attribute(
    tmp_path: Path, attributes: str, message: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(f"type: scalselect_assets.component.SelectionComponent\nattributes: {attributes}\n")
    with pytest.raises(SelectionFileError, match=message) as caught:
        read_selection(path)
    assert str(path) in str(caught.value)


def test_a_declaration_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    declared = selection(budget=100, near_duplicates={})
    written = declared.to_yaml()
    path = tmp_path / "selection.yaml"
    path.write_text(written.replace(DECLARATION_TYPE, EARLIER_TYPE))
    assert EARLIER_TYPE in path.read_text()
    assert read_selection(path) == declared
    assert read_selection(path).to_yaml() == written  # the next run names the component


@pytest.mark.parametrize(
    ("written", "got"),
    [
        ("type: other.Component\nattributes: {}\n", "'other.Component'"),
        (
            "type: scalselect_assets.declaration.selection.SelectionComponent\n",
            "'scalselect_assets.declaration.selection.Sel",
        ),
        ("type: [scalselect_assets.component.SelectionComponent]\n", r"\['scalselect_assets"),
        ("attributes: {name: a, source: s, store: t, target_model: m}\n", "None"),
    ],
)
def test_a_declaration_of_another_type_is_refused_by_name(tmp_path: Path, written: str, got: str) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(written)
    with pytest.raises(SelectionFileError, match=f"declares the type {got}") as caught:
        read_selection(path)
    assert all(text in str(caught.value) for text in (str(path), DECLARATION_TYPE, EARLIER_TYPE))


@pytest.mark.parametrize("written", ["", "3\n", "- type\n"])
def test_a_file_that_holds_no_mapping_is_no_declaration(tmp_path: Path, written: str) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(written)
    with pytest.raises(SelectionFileError, match="does not hold a mapping") as caught:
        read_selection(path)
    assert all(text in str(caught.value) for text in (str(path), DECLARATION_TYPE))


@pytest.mark.parametrize("attributes", ["3", "[name]", "a"])
def test_attributes_that_are_no_mapping_are_refused(tmp_path: Path, attributes: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(f"type: {DECLARATION_TYPE}\nattributes: {attributes}\n")
    with pytest.raises(SelectionFileError, match="has the `attributes`") as caught:
        read_selection(path)
    assert str(path) in str(caught.value)


def test_two_declarations_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in ("a.yaml", "b.yaml"):
        (tmp_path / file).write_text(selection().to_yaml())
    monkeypatch.setenv("SCALSELECT_SELECTIONS", str(tmp_path))
    with pytest.raises(SelectionFileError, match="both declare"):
        declared_selections()


def test_a_declaration_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALSELECT_SELECTIONS", "/no/such/file.yaml")
    with pytest.raises(SelectionFileError, match="does not exist"):
        declared_selections()
