"""Options of `scalselect run` become settings of the declaration."""

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from scalselect_assets.cli import run as run_module
from scalselect_assets.declaration.selection import Selection
from tests.conftest import write_pool_shard


@pytest.fixture
def declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `scalselect run` declares with some options, without running it."""
    write_pool_shard(tmp_path / "pool", "a.jsonl", 1, seed=0)
    seen: list[Selection] = []
    monkeypatch.setattr(run_module, "refresh_and_report", lambda selection, *_, **__: seen.append(selection))
    app = typer.Typer()
    app.command()(run_module.run)

    def declare(*options: str) -> Selection:
        arguments = [str(tmp_path / "pool"), "--store", str(tmp_path / "store"), *options]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return seen[-1]

    return declare


def test_the_place_and_the_size_of_images_are_declared_and_remembered(declared: Any) -> None:
    first = declared("--max-pixels", "589824", "--min-pixels", "262144", "--image-place", "as_written")
    again = declared()
    for selection in (first, again):
        assert (
            selection.target.items()
            >= {
                "image_place": "as_written",
                "min_pixels": 262_144,
                "max_pixels": 589_824,
                "image_size": None,
                "max_tiles": None,
            }.items()
        )
    assert (
        declared("--max-tiles", "6", "--image-size", "728").target.items()
        >= {
            "max_tiles": 6,
            "image_size": 728,
        }.items()
    )


def test_by_default_images_stand_first_and_have_the_models_own_size(declared: Any) -> None:
    target = declared().target
    assert target["image_place"] == "first"
    assert {target[name] for name in ("image_size", "min_pixels", "max_pixels", "max_tiles")} == {None}  # type: ignore[literal-required]


def test_the_bounds_of_one_model_are_not_those_of_another(declared: Any) -> None:
    declared("--model", "org/one", "--max-pixels", "9999", "--image-place", "as_written")
    other = declared("--model", "org/other")
    assert (other.target_model, other.max_pixels, other.image_place) == ("org/other", None, "as_written")


def test_a_lower_bound_above_the_upper_one_is_refused(declared: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="min_pixels 10 above max_pixels 9"):
        declared("--min-pixels", "10", "--max-pixels", "9")
