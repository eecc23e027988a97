"""The component: what a project of Dagster's own builds from the file that this project reads."""

import dagster as dg
import pytest
import yaml
from dagster.components.testing import create_defs_folder_sandbox
from pydantic import ValidationError

from scalselect_assets.component import SelectionComponent
from scalselect_assets.declaration.selection import DECLARATION_TYPE, Selection
from scalselect_assets.deployment import build_defs

DECLARED = Selection(
    name="pool",
    source="/pool",
    store="/store",
    target_model="org/model",
    near_duplicates={"cosine": 0.99},  # type: ignore[arg-type]
    automation="declarative",
)


def test_a_project_of_components_builds_the_same_graph_from_the_same_file() -> None:
    with create_defs_folder_sandbox() as sandbox:
        path = sandbox.scaffold_component(
            component_cls=SelectionComponent, defs_yaml_contents=yaml.safe_load(DECLARED.to_yaml())
        )
        with sandbox.load_component_and_build_defs(defs_path=path) as (component, defs):
            assert isinstance(component, SelectionComponent)
            assert component.model_dump() == DECLARED.model_dump()
            whole = dg.Definitions.merge(defs, build_defs([]))
            assert conditions(whole) == conditions(build_defs([DECLARED]))


def conditions(defs: dg.Definitions) -> dict[dg.AssetKey, object]:
    graph = defs.resolve_asset_graph()
    return {key: graph.get(key).automation_condition for key in graph.get_all_asset_keys()}


def test_declarations_name_the_component() -> None:
    assert f"{SelectionComponent.__module__}.{SelectionComponent.__name__}" == DECLARATION_TYPE
    assert yaml.safe_load(DECLARED.to_yaml())["type"] == DECLARATION_TYPE


def test_a_setting_that_there_is_not_is_refused_by_dagster_too() -> None:
    with pytest.raises(ValidationError, match="buget"):
        SelectionComponent.resolve_from_yaml("{name: a, source: s, store: t, target_model: m, buget: 3}")
