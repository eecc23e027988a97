"""Every file of a pool is a shard, an image, ignored, or counted."""

import os
from pathlib import Path

import pytest
from upath import UPath

from scalselect_assets.resources.pool_listing import ignore_patterns, in_words, list_shards

SHARDS = ["a.jsonl", "b.JSON.GZ", "c.parquet", "d.tar", "e.arrow", "f.jl", "sub/g.ndjson.zst", "h.jsonlines"]


def listed(root: Path, *ignore: str):
    return list_shards(UPath(root), frozenset(), ignore_patterns(ignore))


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    root = tmp_path / "pool"
    for name in (*SHARDS, "images/a.png", "images/b.JPEG", "clips/a.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_every_form_is_a_shard_and_images_are_not_counted(pool: Path) -> None:
    found = listed(pool)

    assert sorted(found.shards) == sorted(SHARDS)
    assert found.passed_over == {}
    assert in_words(found.to_json()) == ""


def test_what_is_passed_over_is_counted_by_kind_with_examples(pool: Path, tmp_path: Path) -> None:
    for name in (
        ".x.jsonl",
        ".hidden/y.jsonl",
        "z.json.txt",
        "y.json.txt",
        "t.tar.gz",
        "u.csv",
        "sub/v.csv",
        "noending",
    ):
        (pool / name).parent.mkdir(parents=True, exist_ok=True)
        (pool / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (pool / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(pool / "pipe.jsonl")
    (pool / "dangling.jsonl").symlink_to("nowhere")  # a shard, which fails by itself

    found = listed(pool)
    told = found.to_json()

    assert "dangling.jsonl" in found.shards

    assert {kind: found["count"] for kind, found in told.items()} == {
        "hidden": 2, "linked_folder": 1, "unreadable": 1, "other:": 1, "other:.csv": 2,
        "other:.json.txt": 2, "other:.tar.gz": 1,
    }  # fmt: skip
    assert sorted(told["other:.csv"]["examples"]) == ["sub/v.csv", "u.csv"]
    assert "2 .csv (such as " in in_words(told)
    assert "1 linked folder(s) (such as linked)" in in_words(told)


@pytest.mark.parametrize(
    "name",
    [
        "dataset_info.json",
        "sub/state.json",
        "trainer_state.json",
        "README.md",
        ".git/x.json",
        "tokenizer.json",
    ],
)
def test_what_libraries_write_beside_a_dataset_is_ignored_and_counted_as_such(pool: Path, name: str) -> None:
    (pool / name).parent.mkdir(parents=True, exist_ok=True)
    (pool / name).touch()

    found = listed(pool)

    assert sorted(found.shards) == sorted(SHARDS)
    assert list(found.passed_over) == ["ignored"]
    assert found.unexpected == {}
    assert in_words(found.to_json()) == ""


def test_declared_patterns_add_to_the_usual_ones_and_take_them_back(pool: Path) -> None:
    for name in ("state.json", "old/a.jsonl", "x.tmp.json"):
        (pool / name).parent.mkdir(parents=True, exist_ok=True)
        (pool / name).touch()

    found = listed(pool, "old", "*.tmp.json", "!state.json", "sub/*")

    assert sorted(found.shards) == sorted([*(name for name in SHARDS if "/" not in name), "state.json"])
    assert found.passed_over["ignored"].count == 3


def test_the_records_of_an_export_are_no_shards_of_it(pool: Path) -> None:
    for name in ("selected_ids.jsonl", "rejected.jsonl", "images.jsonl"):
        (pool / name).touch()

    assert sorted(listed(pool).shards) == sorted(SHARDS)
    (pool / "selected_ids.jsonl").unlink()
    assert {"rejected.jsonl", "images.jsonl"} <= set(listed(pool).shards)
