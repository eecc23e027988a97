"""What can be known before hours of embedding is said before them, with what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalselect_assets.choice.lists import SampleListError
from scalselect_assets.operations.faults import NothingEmbeddedError, RefreshError
from scalselect_assets.operations.summary import summary
from scalselect_assets.resources.evaluation_set import EvaluationSetError
from scalselect_assets.resources.vlm import VlmResource
from tests.bench import Bench
from tests.conftest import png_bytes, sharegpt_row, write_lines

pytestmark = pytest.mark.usefixtures("quick_dagster")


@pytest.fixture
def bench(tmp_path: Path, demo_vlm: Path, make_pool: Callable[..., Path]) -> Bench:
    return Bench(make_pool({"a.jsonl": 4, "b.jsonl": 2}), tmp_path / "store", demo_vlm)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(VlmResource, "encoder", refuse)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"include": "gone.txt"}, SampleListError, "cannot be read"),
        ({"exclude": "gone.csv"}, SampleListError, "cannot be read"),
        ({"decontamination": {"images": "gone"}}, EvaluationSetError, "does not exist"),
        (
            {"quotas": [{"floors": {"zoo": 1}}]},
            RefreshError,
            r"0 row\(s\) of the pool have it; there are 'a' \(4",
        ),
        ({"quotas": [{"floors": {"a": 5}}]}, RefreshError, r"4 row\(s\) of the pool have it"),
        ({"quotas": [{"floors": {"zoo": 0.5}}]}, RefreshError, "Correct the name"),
    ],
)
def test_a_mistake_that_can_be_known_is_said_before_the_model_is_loaded(
    bench: Bench, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    bench.options |= options

    with pytest.raises(error, match=message):
        bench.refresh()


def test_a_floor_above_its_ceiling_is_no_declaration(bench: Bench) -> None:
    bench.options["quotas"] = [{"floors": {"a": 3}, "ceilings": {"a": 2}}]

    with pytest.raises(ValueError, match="a floor of 3 and a ceiling of 2 for 'a'"):
        _ = bench.selection


def test_a_device_without_hardware_is_said_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench.vlm = VlmResource(device="cuda")

    with pytest.raises(RefreshError, match="--device cpu"):
        bench.refresh()


def test_floors_of_sources_that_are_there_are_met(bench: Bench) -> None:
    bench.options["quotas"] = [{"floors": {"b": 2}, "ceilings": {"zoo": 0}}]

    report = bench.refresh()

    assert sorted(report.embedded) == ["a.jsonl", "b.jsonl"]
    assert summary(bench.artifacts)["selected"] == 3


def test_lists_are_matched_and_what_names_nothing_is_told(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("\ufeffid\n0\nnobody\n", encoding="utf-8")
    bench.options["include"] = str(tmp_path / "in.csv")
    bench.refresh()
    assert summary(bench.artifacts)["unknown_listed"] == ["nobody"]

    (tmp_path / "out.txt").write_text("nobody\n", encoding="utf-8")
    bench.options["exclude"] = str(tmp_path / "out.txt")
    with pytest.raises(RefreshError, match="none of the 1 entries of the list to exclude"):
        bench.refresh()


def test_what_is_not_read_is_in_the_summary_the_manifest_and_a_check(bench: Bench) -> None:
    (bench.pool / "c.csv").touch()
    (bench.pool / ".d.jsonl").touch()
    (bench.pool / "old.jsonl").touch()
    bench.options["ignore"] = ["old.*"]

    report = bench.refresh()

    assert {kind: found["count"] for kind, found in report.passed_over.items()} == {
        "hidden": 1, "ignored": 1, "other:.csv": 1,
    }  # fmt: skip
    assert summary(bench.artifacts)["passed_over"] == report.passed_over
    assert report.failed_checks == {}


def test_a_pool_whose_images_are_elsewhere_says_why_and_where_they_are(
    tmp_path: Path, demo_vlm: Path
) -> None:
    (tmp_path / "media" / "images").mkdir(parents=True)
    rows = []
    for n in range(3):
        (tmp_path / "media" / "images" / f"{n}.png").write_bytes(png_bytes(n))
        rows.append(sharegpt_row(f"/mnt/pool/media/images/{n}.png", f"<image>{n}?", "Yes", id=n))
    write_lines(tmp_path / "pool" / "a.jsonl", [*rows, "{broken"])
    bench = Bench(tmp_path / "pool", tmp_path / "store", demo_vlm)

    with pytest.raises(NothingEmbeddedError) as caught:
        bench.refresh()

    told = str(caught.value)
    assert "outside_image_root (3 rows), for example: image '/mnt/pool" in told
    assert "malformed_row (1 rows)" in told
    assert f"are in {tmp_path / 'store' / 'rejected_rows'}." in told
    assert told.endswith(f"--image-root {tmp_path / 'media'}"), told

    bench.options["image_root"] = str(tmp_path / "media")
    assert bench.refresh().computed_rows == 3


def test_advice_is_given_only_where_it_can_be_followed(tmp_path: Path, demo_vlm: Path) -> None:
    write_lines(tmp_path / "pool" / "a.jsonl", [sharegpt_row("gone.png")])
    bench = Bench(tmp_path / "pool", tmp_path / "store", demo_vlm)

    with pytest.raises(NothingEmbeddedError) as caught:
        bench.refresh()

    assert "missing_image (1 rows)" in str(caught.value)
    assert "--image-root" not in str(caught.value)


def test_rows_in_every_form_give_the_same_vectors(tmp_path: Path, bench: Bench) -> None:
    """Embedded images are opened through the same path, and their bytes decide."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [
        {
            **json.loads(line),
            "images": [{"bytes": (bench.pool / "images" / f"{n}.png").read_bytes(), "path": None}],
        }
        for n, line in enumerate((bench.pool / "a.jsonl").read_text(encoding="utf-8").splitlines())
    ]
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "tables" / "a.parquet")
    bench.refresh()
    tables = Bench(tmp_path / "tables", tmp_path / "store2", Path(bench.options["target_model"]))
    shutil.rmtree(bench.pool / "images")

    report = tables.refresh()

    assert report.computed_rows == 4
    assert summary(tables.artifacts)["rejected"] == {}
    assert tables.refresh().runs == []
