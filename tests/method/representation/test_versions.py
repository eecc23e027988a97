"""A library that is too old is named before anything of a model is read."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scalselect_assets.method.representation import versions
from scalselect_assets.method.representation.loading import ModelLoadError, load_card, load_encoder
from scalselect_assets.method.representation.versions import OLDEST, outdated_library

ROOT = Path(__file__).parents[3]


def install(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    """As on a machine with these versions, and new ones of the rest."""
    monkeypatch.setattr(versions, "version", lambda name: installed.get(name, "99.0"))


def test_what_is_installed_here_will_do() -> None:
    assert outdated_library() is None


@pytest.mark.parametrize("found", ["5.23.0", "5.23", "5.23.0.dev0", "5.24.1", "6.0", "10.1.0+cu130"])
def test_a_version_from_the_oldest_on_will_do(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, transformers=found)
    assert outdated_library() is None


@pytest.mark.parametrize("found", ["5.17.0", "5.9.2", "4.57.3", "5.22.0rc1", "5"])
@pytest.mark.parametrize("load", [load_encoder, load_card])
def test_too_old_a_transformers_is_named_as_the_reason(
    load: object, found: str, monkeypatch: pytest.MonkeyPatch, demo_vlm: Path
) -> None:
    install(monkeypatch, transformers=found)
    with pytest.raises(ModelLoadError) as refused:
        load(str(demo_vlm))  # type: ignore[operator]
    told = str(refused.value)
    assert f"transformers {found} is installed, which is too old: 5.23 or newer is needed" in told
    assert "pip install -U 'transformers>=5.23'" in told
    assert "off by" not in told


def test_the_other_libraries_are_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OLDEST:
        install(monkeypatch, **{name: "0.1"})
        assert f"{name} 0.1 is installed" in (outdated_library() or "")


def test_the_oldest_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {one.name: one for one in map(Requirement, project["dependencies"])}
    for name, oldest in OLDEST.items():
        lowest = [one.version for one in declared[name].specifier if one.operator == ">="]
        assert lowest == [".".join(map(str, oldest))]
