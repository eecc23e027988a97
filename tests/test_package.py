"""The wheel: it holds one package, works in a project of the classic layout, and its pins are complete."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scalselect_assets.declaration.selection import Selection
from tests.conftest import sharegpt_row, write_lines

ROOT = Path(__file__).parents[1]
PACKAGE = "scalselect_assets"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

FOREIGN_DEFINITIONS = """\
import dagster as dg
from resources import RESOURCES

from scalselect_assets.deployment import build_defs, declared_selections


@dg.asset(deps=[["pets", "training_dataset"]])
def tuned_model() -> None:
    pass


defs = dg.Definitions.merge(
    build_defs(declared_selections()), dg.Definitions(assets=[tuned_model], resources=RESOURCES)
)
"""
FOREIGN_RUN = """\
import json

import dagster as dg
import resources

import scalselect_assets
from definitions import defs
from scalselect_assets.code_location import defs as ours

with dg.DagsterInstance.ephemeral() as instance:
    instance.add_dynamic_partitions("pets_shards", ["pets.jsonl"])
    result = defs.resolve_job_def("pets_assets").execute_in_process(
        asset_selection=[dg.AssetKey(["pets", "raw_samples"])], partition_key="pets.jsonl", instance=instance
    )
print(
    json.dumps(
        {
            "files": {"scalselect_assets": scalselect_assets.__file__, "resources": resources.__file__},
            "theirs": sorted(key.to_user_string() for key in defs.resolve_asset_graph().get_all_asset_keys()),
            "ours": sorted(key.to_user_string() for key in ours.resolve_asset_graph().get_all_asset_keys()),
            "success": result.success,
        }
    )
)
"""


def files_of_the_package() -> set[str]:
    """Every file of the package in the source tree."""
    files = (path for path in (ROOT / PACKAGE).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(processes: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that no build folder of an earlier time has a part in it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "definitions.py"):
        shutil.copy(ROOT / name, source / name)
    for name in (PACKAGE, "resources", "training", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    built = subprocess.run(
        [sys.executable, "-c", "from setuptools.build_meta import build_wheel; print(build_wheel('out'))"],
        cwd=source,
        capture_output=True,
        text=True,
        check=True,
    )
    return source / "out" / built.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with the wheel in it; installing a wheel of pure Python means unpacking it."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A Dagster project with `definitions.py` and `resources/` of its own, and a declared selection."""
    project = tmp_path / "project"
    (project / "resources").mkdir(parents=True)
    (project / "resources" / "__init__.py").write_text('RESOURCES = {"warehouse": "duckdb"}\n')
    (project / "definitions.py").write_text(FOREIGN_DEFINITIONS)
    write_lines(tmp_path / "pool" / "pets.jsonl", [sharegpt_row("dog.png")])
    selection = Selection(
        name="pets", source=str(tmp_path / "pool"), store=str(tmp_path / "store"), target_model="org/model"
    )
    (project / "pets.yaml").write_text(selection.to_yaml())
    return project


def in_the_project(project: Path, site: Path, code: str, *arguments: str) -> str:
    """What Python prints in the project's folder with the wheel in place of the source tree."""
    environment = {**os.environ, "PYTHONPATH": str(site), "SCALSELECT_SELECTIONS": str(project / "pets.yaml")}
    finished = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_wheel_installs_one_top_level_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        top = {name.partition("/")[0] for name in archive.namelist()}
    assert top == {PACKAGE, f"scalselect_dagster-{PROJECT['version']}.dist-info"}


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith(f"{PACKAGE}/")}
    assert held == files_of_the_package()
    assert f"{PACKAGE}/py.typed" in held


def test_the_wheel_works_beside_a_projects_own_resources(site: Path, foreign: Path) -> None:
    said = json.loads(in_the_project(foreign, site, FOREIGN_RUN).splitlines()[-1])
    assert Path(said["files"]["scalselect_assets"]).is_relative_to(site)
    assert Path(said["files"]["resources"]).is_relative_to(foreign)
    assert "pets/selected_subset" in said["ours"]
    assert set(said["theirs"]) == {*said["ours"], "tuned_model"}
    assert said["success"]
    assert list((foreign.parent / "store" / "raw_samples").iterdir())


def test_the_command_of_the_wheel_prints_its_version(site: Path, foreign: Path) -> None:
    installed = Distribution.at(site / f"scalselect_dagster-{PROJECT['version']}.dist-info")
    (command,) = installed.entry_points.select(group="console_scripts")
    assert command.name == "scalselect"
    code = f"import sys; from {command.module} import {command.attr}; sys.exit({command.attr}())"
    printed = in_the_project(foreign, site, code, "--version")
    assert printed.split() == ["scalselect-dagster", PROJECT["version"]]


def required(requirements: list[str], extras: set[str]) -> set[tuple[str, str]]:
    """The requirements that hold on this machine, each with one of its extras, or with none as ''."""
    found = set()
    for requirement in map(Requirement, requirements):
        environments = [{"extra": extra} for extra in extras or {""}]
        if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
            name = canonicalize_name(requirement.name)
            found |= {(name, extra) for extra in requirement.extras or {""}}
    return found


def installed_requirements() -> set[str]:
    """The names of all installed packages that the project and its extras require, directly or not."""
    optional = [each for extra in PROJECT["optional-dependencies"].values() for each in extra]
    left, seen = required([*PROJECT["dependencies"], *optional], set()), set[tuple[str, str]]()
    while left:
        seen.add(pair := left.pop())
        try:
            left |= required(distribution(pair[0]).requires or [], {pair[1]}) - seen
        except PackageNotFoundError:  # of an extra that is not installed here
            seen.remove(pair)
    return {name for name, _ in seen}


def test_every_package_that_an_installation_brings_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {
        canonicalize_name(match[1]) for line in lines if (match := re.match(r"([A-Za-z0-9._-]+)==\S", line))
    }
    assert installed_requirements() - pinned == set()
