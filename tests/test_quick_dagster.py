"""The shortcuts of `tests.quick_dagster`: a Dagster that has changed makes tests slower, not wrong."""

import sys
from importlib import import_module
from pathlib import Path

import dagster as dg
import pytest

from tests.quick_dagster import quick_storage


@pytest.mark.parametrize(
    ("owner", "name", "left_out"),
    [
        ("dagster._core.storage.runs.sqlite.sqlite_run_storage", "create_engine", "kept connections"),
        ("dagster._core.storage.local_compute_log_manager", "LocalComputeLogManager", "what runs print"),
        ("dagster", "JobDefinition", "kept jobs"),
    ],
)
def test_a_shortcut_whose_place_is_gone_is_left_out_with_a_warning(
    owner: str, name: str, left_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(import_module(owner), name)
    with pytest.warns(UserWarning, match=f"{left_out}.*{name}") as warned, quick_storage(tmp_path):
        pass
    assert len(warned) == 1


def test_a_module_that_is_gone_costs_its_shortcut_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dagster._core.storage.local_compute_log_manager", None)
    with pytest.warns(UserWarning, match="no copies of what runs print"), quick_storage(tmp_path):
        pass


def test_nothing_stays_patched() -> None:
    patched = dg.DagsterInstance.from_config, dg.JobDefinition.as_ephemeral_job
    with quick_storage(Path("unused")):
        assert dg.JobDefinition.as_ephemeral_job is not patched[1]
    assert (dg.DagsterInstance.from_config, dg.JobDefinition.as_ephemeral_job) == patched
