"""Images that are not there for a while cost nothing, and many of them at once stop a refresh."""

import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from scalselect_assets.operations.faults import RefreshError
from scalselect_assets.operations.summary import summary
from scalselect_assets.pool.missing_images import kept_rows
from tests.bench import Bench

pytestmark = pytest.mark.usefixtures("one_torch_thread", "quick_dagster")


@pytest.fixture
def bench(standing: Callable[..., Path], demo_vlm: Path) -> Bench:
    folder = standing({"a.jsonl": 5, "b.jsonl": 4})
    bench = Bench(folder / "pool", folder / "store", demo_vlm)
    bench.first_refresh()
    return bench


def image(bench: Bench) -> Path:
    return min((bench.pool / "images").iterdir())


def test_an_empty_mount_point_stops_the_refresh_with_the_numbers_and_changes_nothing(bench: Bench) -> None:
    before = bench.files()
    shutil.move(bench.pool / "images", bench.pool.parent / "unmounted")
    (bench.pool / "images").mkdir()
    for _ in range(2):
        with pytest.raises(RefreshError) as refused:
            bench.refresh()
        assert "9 of 9 images (100.0%) that were there are missing now, in 2 shards" in str(refused.value)
        assert "allowed are 5.0%" in str(refused.value)
        assert f"Mount the file system that holds them below {bench.pool}" in str(refused.value)
    changed = {name for name, digest in bench.files().items() if before.get(name) != digest}
    assert changed == set()

    (bench.pool / "images").rmdir()
    shutil.move(bench.pool.parent / "unmounted", bench.pool / "images")
    report = bench.refresh()
    assert (report.runs, report.computed_rows, report.problems()) == ([], 0, [])


def test_a_part_of_the_images_that_is_gone_stops_it_too_and_a_few_do_not(bench: Bench) -> None:
    for path in sorted((bench.pool / "images").iterdir())[:2]:
        path.unlink()
    with pytest.raises(RefreshError, match=r"2 of 9 images \(22.2%\)"):
        bench.refresh()
    bench.options["max_missing_images"] = 0.25
    assert bench.refresh().kept_rows == {"a.jsonl": 2}


def test_rows_keep_their_vectors_until_a_person_agrees_that_their_images_are_gone(bench: Bench) -> None:
    bench.options["max_missing_images"] = 0.2
    before, gone = bench.vectors(), image(bench)
    content = gone.read_bytes()
    gone.unlink()
    for _ in range(2):
        report = bench.refresh()
        assert (report.computed_rows, report.kept_rows) == (0, {"a.jsonl": 1})
        assert bench.vectors().keys() == before.keys()
    assert summary(bench.artifacts)["embedded"] == 9

    report = bench.refresh(accept_missing_images=True)
    assert (report.computed_rows, report.kept_rows) == (0, {})
    assert summary(bench.artifacts)["embedded"] == 8
    assert summary(bench.artifacts)["rejected"] == {"missing_image": 1}
    assert bench.refresh().runs == []

    gone.write_bytes(content)
    assert bench.refresh().computed_rows == 1
    assert summary(bench.artifacts)["embedded"] == 9


def test_a_row_that_is_changed_while_its_image_is_missing_keeps_nothing(bench: Bench) -> None:
    bench.options["max_missing_images"] = 0.2
    image(bench).unlink()
    shard = bench.pool / "a.jsonl"
    shard.write_text(shard.read_text().replace("Is this picture 0?", "Is this another question?"))
    report = bench.refresh()
    assert (report.computed_rows, report.kept_rows) == (0, {})
    assert summary(bench.artifacts)["rejected"] == {"missing_image": 1}


def rows(*given: tuple[str, str | None]) -> pl.DataFrame:
    """Rows by key and reason, in the columns that matter here."""
    return pl.DataFrame(
        {
            "row": range(len(given)),
            "sample_key": [key for key, _ in given],
            "row_format": [None if reason else "llava" for _, reason in given],
            "conversation": [None if reason else "[]" for _, reason in given],
            "images": [[] if reason else [f"{key}.png"] for key, reason in given],
            "reason": [reason for _, reason in given],
            "detail": [reason for _, reason in given],
        },
        schema={
            "row": pl.Int64,
            **dict.fromkeys(("sample_key", "row_format", "conversation"), pl.String),
            "images": pl.List(pl.String),
            **dict.fromkeys(("reason", "detail"), pl.String),
        },
    )


def test_only_rows_that_miss_an_image_and_had_one_stand_as_they_did() -> None:
    earlier = rows(("a", None), ("b", None), ("c", "missing_image"), ("d", None))
    now = rows(
        ("d", None), ("c", "missing_image"), ("b", "malformed_row"), ("a", "missing_image"), ("e", None)
    )
    kept, count = kept_rows(earlier, now)
    assert count == 1
    assert kept["reason"].to_list() == [None, "missing_image", "malformed_row", None, None]
    assert kept.row(3, named=True) == {**earlier.row(0, named=True), "row": 3}
    assert kept_rows(None, now) == (now, 0)
    assert kept_rows(rows(), rows())[1] == 0
