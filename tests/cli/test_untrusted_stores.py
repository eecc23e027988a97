"""Stores that are damaged, read-only or full of other people's text: a message, and never a wrong result."""

import json
import os
import re
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from scalselect_assets import deployment
from scalselect_assets.operations import damaged_records
from scalselect_assets.resources import artifacts as artifact_files
from scalselect_assets.resources.artifacts import ArtifactStore
from tests.cli.conftest import Command, summary_of
from tests.conftest import sharegpt_row, write_lines, write_pool_shard
from tests.quick_dagster import closed_connections

pytestmark = pytest.mark.usefixtures("one_torch_thread", "quick_dagster")

HOSTILE_ID = "[bold red]:smile:[/] \x1b[31m\x9b2J \u202e"


@pytest.fixture
def store(scalselect: Command, tmp_path: Path, demo_vlm: Path) -> Path:
    """A store of a pool with a hostile row."""
    write_pool_shard(tmp_path / "pool", "a.jsonl", 6, seed=0)
    write_pool_shard(tmp_path / "pool", "b.jsonl", 4, seed=100)
    rows = (tmp_path / "pool" / "b.jsonl").read_text().splitlines()
    rows.append(json.dumps(sharegpt_row("images/100.png", "<image>\nOdd?", id=HOSTILE_ID)))
    write_lines(tmp_path / "pool" / "b.jsonl", rows)
    os.utime(tmp_path / "pool" / "b.jsonl", (1e9, 1e9))
    for image in [*(tmp_path / "pool" / "images").iterdir(), tmp_path / "pool" / "a.jsonl"]:
        os.utime(image, (1e9, 1e9))
    made = scalselect(
        "run", "pool", "--store", "store", "--model", demo_vlm, "--budget", "0.5", "--device", "cpu"
    )
    assert made.returncode == 0, made.stderr
    return tmp_path / "store"


def flat(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def test_text_of_the_pool_acts_on_no_terminal(scalselect: Command, store: Path) -> None:
    for command in (("status", "--sample", "b.jsonl#4"), ("explain", "b.jsonl#4")):
        for extra in ((), ("--json",)):
            shown = scalselect(*command, "--store", store, *extra)
            text = shown.stdout + shown.stderr
            assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text), command
            assert "[bold red]:smile:[/]" in text


def test_a_name_in_a_message_acts_on_no_terminal(scalselect: Command, store: Path) -> None:
    (store.parent / "pool" / "\x1b[2J[bold]:x:.jsonl").write_text('"no row"')
    os.utime(store.parent / "pool" / "\x1b[2J[bold]:x:.jsonl", (1e9, 1e9))
    failed = scalselect("run", "pool", "--store", "store")
    assert failed.returncode == 1
    assert "\x1b[2J" not in failed.stdout + failed.stderr
    assert "\\x1b[2J[bold]:x:.jsonl" in flat(failed.stderr)


@pytest.mark.parametrize("place", ["source", "store", "image_root"])
def test_credentials_in_a_uri_are_refused_and_in_no_message(
    scalselect: Command,
    tmp_path: Path,
    demo_vlm: Path,
    place: str,
) -> None:
    write_pool_shard(tmp_path / "pool", "a.jsonl", 2, seed=0)
    uri = "memory://me:hunter2@place/x"
    places = {"source": "pool", "store": "store", "image_root": None, place: uri}
    root = ["--image-root", places["image_root"]] if places["image_root"] else []
    refused = scalselect("run", places["source"], "--store", places["store"], *root, "--model", demo_vlm)
    assert refused.returncode == 2
    assert "names a user or a password" in flat(refused.stderr)
    for text in [refused.stdout, refused.stderr, *(p.read_text() for p in tmp_path.rglob("*.yaml"))]:
        assert "hunter2" not in text
    (tmp_path / "other").mkdir()
    declared = "type: scalselect_assets.component.SelectionComponent\nattributes: {name: x, source: 'URI', "
    declared += "store: ., target_model: m}\n"
    (tmp_path / "other" / "selection.yaml").write_text(declared.replace("URI", uri))
    for command in (("status",), ("verify",), ("explain", "abcdef")):
        refused = scalselect(*command, "--store", "other")
        assert refused.returncode == 1
        assert "hunter2" not in refused.stdout + refused.stderr


def test_a_damaged_file_of_dagsters_records_is_named_with_the_remedy(
    scalselect: Command,
    store: Path,
) -> None:
    index = store / "dagster" / "history" / "runs" / "index.db"
    data = bytearray(index.read_bytes())
    data[0:2000] = b"\xff" * 2000
    index.write_bytes(data)
    for log in index.parent.glob("index.db-*"):
        log.unlink()  # SQLite would take the first page from there
    with closed_connections():
        for command in (("status",), ("verify",), ("explain", "b.jsonl#0"), ("run", "pool")):
            named = scalselect(*command, "--store", store)
            assert named.returncode == 1
            assert str(index) in flat(named.stderr).replace(" ", "")
            assert "move that folder away and run again" in flat(named.stderr)

    (store / "dagster").rename(store.parent / "moved-away")
    healed = summary_of(scalselect("run", "pool", "--store", "store", "--json"))
    assert (healed["samples_computed"], healed["selected"]) == (0, 5)


def test_damage_is_found_by_reading_everything_and_repaired_on_request(
    scalselect: Command,
    store: Path,
) -> None:
    whole = scalselect("verify", "--deep", "--store", store)
    assert whole.returncode == 0, whole.stderr
    assert "scores and choice follow from the vectors" in flat(whole.stdout)
    before = (store / "training_dataset" / "train.jsonl").read_bytes()
    artifacts = ArtifactStore(deployment.StorageResource().path(str(store)))
    scores, header = artifacts.read_frame("importance_scores", "a.jsonl")
    wrong = scores.with_columns(pl.col("normalised_leverage") + pl.Series([0.5, -0.5, *[0.0] * 4]))
    artifacts.write_frame("importance_scores", wrong, header, "a.jsonl")
    damaged = store / "raw_samples" / "b_2ejsonl.parquet"
    status = damaged.stat()
    data = bytearray(damaged.read_bytes())
    data[len(data) // 3] ^= 1
    damaged.write_bytes(data)
    os.utime(damaged, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk changes bytes

    found = scalselect("verify", "--deep", "--store", store)
    assert found.returncode == 1
    assert "importance_scores[a.jsonl] is off by 0.5" in flat(found.stderr)
    assert "raw_samples/b_2ejsonl.parquet" in flat(found.stderr).replace(" ", "")
    assert "--repair" in found.stderr
    repaired = scalselect("run", "pool", "--store", "store", "--repair")
    assert repaired.returncode == 0, repaired.stderr
    assert "0 samples computed" in flat(repaired.stdout)
    assert scalselect("verify", "--deep", "--store", store).returncode == 0
    assert (store / "training_dataset" / "train.jsonl").read_bytes() == before


def test_a_changed_byte_of_the_training_file_is_noticed_by_every_command_and_healed_by_the_next_run(
    scalselect: Command,
    store: Path,
) -> None:
    file = store / "training_dataset" / "train.jsonl"
    before = file.read_bytes()
    file.write_bytes(before.replace(b"picture", b"pictury", 1))
    pending = summary_of(scalselect("status", "--store", store, "--json"))["pending"]
    assert pending == ["training_dataset", "selection_report"]
    assert scalselect("run", "pool", "--store", "store").returncode == 0
    assert file.read_bytes() == before


def test_a_store_that_cannot_be_written_can_be_looked_at(
    scalselect: Command,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def files() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(30, "Read-only file system", str(store))

    (index,) = store.glob("shard_index-*/a_2ejsonl.json")
    index.unlink()
    before = files()
    monkeypatch.setattr(damaged_records, "is_writable", lambda _: False)
    monkeypatch.setattr(deployment, "is_writable", lambda _: False)
    monkeypatch.setattr(artifact_files.ArtifactStore, "_atomic", refuse)
    for command in (("status",), ("status", "--sample", "b.jsonl#0"), ("explain", "b.jsonl#0"), ("verify",)):
        looked = scalselect(*command, "--store", store)
        assert looked.returncode == 0, looked.stderr
    assert scalselect("verify", "--deep", "--store", store).returncode == 0
    assert files() == before


def test_the_declaration_is_the_old_or_the_new_one_when_the_disk_is_full(
    scalselect: Command,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    declared = (store / "selection.yaml").read_text()
    fsync: Callable[[int], None] = os.fsync

    def full(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(28, os.strerror(28))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    failed = scalselect("run", "pool", "--store", "store", "--budget", "3")
    assert failed.returncode == 1
    assert "No space left" in failed.stderr
    monkeypatch.undo()
    assert (store / "selection.yaml").read_text() == declared
    assert not [path for path in store.iterdir() if path.name.startswith(".writing")]


def test_a_first_run_that_fails_after_it_has_computed_something_keeps_its_declaration(
    scalselect: Command,
    tmp_path: Path,
    demo_vlm: Path,
) -> None:
    write_pool_shard(tmp_path / "pool", "a.jsonl", 3, seed=0)
    common = ("--store", "store", "--model", demo_vlm, "--device", "cpu")
    failed = scalselect("run", "pool", *common, "--budget", "99")
    assert failed.returncode == 1
    assert (tmp_path / "store" / "selection.yaml").exists()
    assert scalselect("run", "pool", "--store", "store", "--budget", "2").returncode == 0


def test_the_whole_file_of_records_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "good.db") as connection:
        connection.execute("create table t (x)")
    (tmp_path / "bad.db").write_bytes(b"SQLite format 3\x00" + b"\xff" * 5000)
    assert [damaged_records.is_whole(file) for file in damaged_records.databases(tmp_path)] == [False, True]


def test_records_that_somebody_holds_are_not_called_damaged(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "held.db") as connection:
        connection.execute("create table t (x)")
    for error in (sqlite3.OperationalError("database is locked"), sqlite3.OperationalError("disk I/O error")):
        with (
            pytest.raises(damaged_records.DamagedRecordsError, match="cannot be used now") as raised,
            damaged_records.named_damage(tmp_path),
        ):
            raise RuntimeError("a run failed") from error
        assert "move that folder away" not in str(raised.value)
    with pytest.raises(KeyError), damaged_records.named_damage(tmp_path):
        raise KeyError("something else")
