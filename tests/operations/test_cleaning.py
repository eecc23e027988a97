"""Cleaning a store: what goes and when, what never goes, and that a kill on the way leaves a whole store."""

import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest

from scalselect_assets.choice import decontamination, image_hashes
from scalselect_assets.deployment import build_defs, open_instance
from scalselect_assets.embedding import receipts, reuse
from scalselect_assets.operations import leftovers, survey
from scalselect_assets.operations.cleaning import clean
from scalselect_assets.operations.leftovers import Kind, MaintenanceReport
from scalselect_assets.resources import table_versions
from scalselect_assets.resources.artifacts import ArtifactCorruptError
from scalselect_assets.resources.locks import StoreBusyError
from scalselect_assets.resources.search_table import SEARCH_TABLE, search_table
from scalselect_assets.subspace import pool_moments
from tests.bench import Bench
from tests.conftest import write_lines, write_pool_shard

pytestmark = pytest.mark.usefixtures("one_torch_thread", "quick_dagster")

DAY = 86_400.0


@pytest.fixture(scope="module")
def refreshed(
    tmp_path_factory: pytest.TempPathFactory, demo_vlm: Path, one_torch_thread: None, quick_dagster: None
) -> Path:
    """A folder in which a pool and its store are up to date, and a copy of it beside."""
    folder = tmp_path_factory.mktemp("refreshed") / "now"
    for seed, (shard, n_rows) in enumerate({"a.jsonl": 5, "b.jsonl": 4}.items()):
        write_pool_shard(folder / "pool", shard, n_rows, seed=1000 * seed)
    Bench(folder / "pool", folder / "store", demo_vlm).refresh()
    shutil.copytree(folder, folder.with_name("copy"))
    return folder


def put_in_place(copy: Path, place: Path, model: Path) -> Bench:
    """Places are part of what a dataset is made from, so a copy is up to date in one place only."""
    shutil.rmtree(place)
    shutil.copytree(copy, place)
    return Bench(place / "pool", place / "store", model)


@pytest.fixture
def bench(refreshed: Path, demo_vlm: Path) -> Bench:
    """The copy put back in place."""
    return put_in_place(refreshed.with_name("copy"), refreshed, demo_vlm)


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let cleaning read a clock that is some days ahead; LanceDB, which reads its own, is not told."""

    def ahead(days: float) -> None:
        monkeypatch.setattr(survey.time, "time", lambda: time.time_ns() / 1e9 + days * DAY)

    return ahead


def cleaned(bench: Bench, days: float = 0, *, dry_run: bool = False) -> MaintenanceReport:
    with open_instance(bench.selection) as instance:
        return clean(
            bench.selection, bench.storage, instance, retention=timedelta(days=days), dry_run=dry_run
        )


def told(leftovers: tuple[leftovers.Leftover, ...]) -> dict[str, dict[str, int]]:
    """Counts by kind and reason."""
    found: dict[str, dict[str, int]] = {}
    for leftover in leftovers:
        reasons = found.setdefault(leftover.kind, {})
        reasons[leftover.why] = reasons.get(leftover.why, 0) + leftover.count
    return found


def counts(report: MaintenanceReport) -> dict[str, int]:
    """What went, by kind."""
    return {kind: sum(reasons.values()) for kind, reasons in told(report.removed).items()}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def results_size(bench: Bench) -> int:
    """Bytes of the store without Dagster's files and what locks say of their holder."""
    return sum(size(folder) for folder in bench.store.iterdir() if folder.name not in {"dagster", ".locks"})


def files_of(bench: Bench, shard: str) -> list[str]:
    return [str(path) for path in bench.store.rglob(f"*{shard.replace('.', '_2e')}*")]


def change(bench: Bench, shard: str, question: str) -> None:
    rows = (bench.pool / shard).read_text().splitlines()
    write_lines(bench.pool / shard, [rows[0].replace("picture", question), *rows[1:]])


def let_time_pass(bench: Bench) -> None:
    """Versions made within a second of each other are left alone."""
    table, _ = receipts.recorded_table(bench.artifacts, "a.jsonl")
    newest = max(path.stat().st_mtime for path in table_folder(bench, table.table).rglob("*"))
    time.sleep(max(0.0, newest + 1.1 - time.time()))


def table_folder(bench: Bench, table: str) -> Path:
    return bench.store / "lance" / f"{table}.lance"


def assert_up_to_date(bench: Bench) -> None:
    report = bench.refresh()
    assert (report.runs, report.embedded, report.failed) == ([], [], {})


def replaced_once(bench: Bench) -> None:
    """A second version of a.jsonl's table."""
    let_time_pass(bench)
    change(bench, "a.jsonl", "photograph")
    assert bench.refresh().embedded == ["a.jsonl"]


# Nothing to do


def test_a_store_without_leftovers_stays_as_it_is(bench: Bench) -> None:
    before = bench.files()
    report = cleaned(bench)
    assert (report.removed, report.kept, report.bytes_freed) == ((), (), 0)
    assert bench.files() == before
    assert_up_to_date(bench)


def test_nobody_else_may_be_at_work(bench: Bench) -> None:
    leftover = bench.store / "raw_samples" / f".writing-{'0' * 32}"
    leftover.touch()
    locks = bench.storage.locks(str(bench.store))
    for work in (locks.refreshing(), locks.writing("b.jsonl", pytest.fail)):
        with work, pytest.raises(StoreBusyError, match="is at work"):
            cleaned(bench)
    assert leftover.exists()


def test_what_a_damaged_basis_needs_is_not_guessed(bench: Bench) -> None:
    replaced_once(bench)
    basis = bench.store / "subspace_basis" / "subspace_basis.safetensors"
    basis.write_bytes(basis.read_bytes()[:40])
    before = bench.files()
    with pytest.raises(ArtifactCorruptError, match="subspace_basis cannot be read"):
        cleaned(bench)
    assert bench.files() == before


def test_a_pool_that_is_away_does_not_count_as_empty(bench: Bench, tmp_path: Path) -> None:
    bench.pool.rename(tmp_path / "away")
    before = bench.files()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        cleaned(bench)
    bench.pool.mkdir()
    report = cleaned(bench)
    assert report.removed == ()
    assert told(report.kept) == {Kind.GONE_SHARDS: {"no refresh has seen yet that it left the pool": 2}}
    assert bench.files() == before


def test_a_retention_time_below_zero_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="zero or more"):
        cleaned(bench, days=-1)


# Old versions of tables


def test_replaced_versions_go_after_the_retention_time_and_their_bytes_are_freed(bench: Bench) -> None:
    replaced_once(bench)
    vectors, before = bench.vectors(), results_size(bench)
    young = cleaned(bench, days=7)
    assert (young.removed, told(young.kept)) == (
        (),
        {Kind.OLD_VERSIONS: {"the retention time has not passed": 1}},
    )
    rehearsed = cleaned(bench, dry_run=True)
    assert results_size(bench) == before
    report = cleaned(bench)
    assert counts(report) == {Kind.OLD_VERSIONS: 1}
    assert replace(rehearsed, dry_run=False) == report
    freed = before - results_size(bench)
    assert 0 < report.bytes_freed <= freed <= report.bytes_freed + 4000  # and what LanceDB notes of a version
    np.testing.assert_equal(bench.vectors(), vectors)
    assert cleaned(bench).removed == ()
    assert_up_to_date(bench)


def test_the_recorded_version_survives_where_a_newer_one_was_never_recorded(bench: Bench) -> None:
    replaced_once(bench)
    let_time_pass(bench)
    store = bench.storage.embeddings(str(bench.store))
    recorded, _ = receipts.recorded_table(bench.artifacts, "a.jsonl")
    # As a process leaves it that is killed between the table's commit and the receipt.
    unrecorded = store.replace(
        recorded.fingerprint,
        "a.jsonl",
        dimension=recorded.dimension,
        rows=[0],
        sample_keys=["other"],
        source_ids=[None],
        vectors=np.ones((1, recorded.dimension), np.float32),
        attributes={},
    )
    assert (recorded.version, unrecorded.version) == (2, 3)
    vectors = bench.vectors()
    report = cleaned(bench)
    assert counts(report) == {Kind.OLD_VERSIONS: 1}
    assert told(report.kept) == {Kind.OLD_VERSIONS: {"newer than a version that is needed": 1}}
    np.testing.assert_equal(bench.vectors(), vectors)
    assert_up_to_date(bench)


def test_the_version_that_the_basis_holds_stays_beside_the_recorded_one(bench: Bench) -> None:
    let_time_pass(bench)
    change(bench, "a.jsonl", "photograph")
    asked = iter([False, False, True])  # reading the rows and embedding them, but no basis
    with pytest.raises(dg.DagsterExecutionInterruptedError):
        bench.refresh(should_stop=lambda: next(asked))
    basis = json.loads(bench.artifacts.read_header("subspace_basis", suffix=".safetensors")["shards"])
    held = replace(
        receipts.recorded_table(bench.artifacts, "a.jsonl")[0],
        version=int(basis["a.jsonl"]["lance_version"]),
    )
    report = cleaned(bench)
    assert report.removed == ()
    handle = table_versions.TableVersions(bench.storage.embeddings(str(bench.store)))
    assert [version.number for version in handle.versions(held.table)] == [held.version, held.version + 1]
    # So do the moments that the totals still hold, to be taken out of them.
    assert len(bench.artifacts.paths(pool_moments.RETIRED, suffix=".safetensors")) == 1
    bench.refresh()
    assert counts(cleaned(bench)) == {Kind.OLD_VERSIONS: 1}


def test_a_clock_that_jumps_while_versions_are_removed_costs_none_that_is_needed(bench: Bench) -> None:
    replaced_once(bench)
    let_time_pass(bench)
    table, _ = receipts.recorded_table(bench.artifacts, "a.jsonl")
    tables = table_versions.TableVersions(bench.storage.embeddings(str(bench.store)))
    folder = table_folder(bench, table.table)
    before = size(folder)
    with pytest.raises(table_versions.TableRefusedError, match="tagged"):
        tables.prune(table.table, time.time(), [1])
    assert size(folder) == before
    assert not [path for path in folder.rglob("*") if table_versions._PIN in path.name]
    # A cleaning that was killed in between leaves its tags, which hold nothing up later.
    tables._connection.open_table(table.table).tags.create(f"{table_versions._PIN}1", 1)
    assert counts(cleaned(bench)) == {Kind.OLD_VERSIONS: 1}


def test_a_table_that_cannot_be_read_is_left_to_the_refresh(bench: Bench) -> None:
    replaced_once(bench)
    table, _ = receipts.recorded_table(bench.artifacts, "a.jsonl")
    shutil.rmtree(table_folder(bench, table.table) / "_versions")
    report = cleaned(bench)
    assert report.removed == ()
    (kept,) = report.kept
    assert (kept.kind, kept.name) == (Kind.OLD_VERSIONS, table.table)
    assert "cannot be read" in kept.why


# Shards that left the pool


def test_a_shard_that_left_goes_once_that_has_lasted(
    bench: Bench, set_clock: Callable[[float], None], tmp_path: Path
) -> None:
    shutil.move(bench.pool / "a.jsonl", tmp_path / "a.jsonl")
    bench.refresh()
    before = files_of(bench, "a.jsonl")
    # Old as its files may be, it has been gone only since a cleaning has seen it.
    set_clock(30)
    assert told(cleaned(bench, days=7).kept) == {
        Kind.GONE_SHARDS: {"the retention time has not passed": 1},
        Kind.LOCKS: {"the retention time has not passed": 2},
    }
    set_clock(36)
    assert cleaned(bench, days=7).removed == ()
    assert files_of(bench, "a.jsonl") == before
    set_clock(38)
    n_bytes = results_size(bench)
    report = cleaned(bench, days=7)
    assert counts(report) == {Kind.GONE_SHARDS: 1, Kind.LOCKS: 2}
    assert report.removed[0].name == "a.jsonl"
    assert abs(n_bytes - results_size(bench) - report.bytes_freed) < 200  # the notes themselves
    assert files_of(bench, "a.jsonl") == []
    assert_up_to_date(bench)
    shutil.move(tmp_path / "a.jsonl", bench.pool / "a.jsonl")
    assert bench.refresh().embedded == ["a.jsonl"]
    assert_up_to_date(bench)


def test_what_curation_keeps_of_a_shard_goes_with_it(bench: Bench) -> None:
    artifacts = bench.storage.artifacts(str(bench.store))
    kept = {
        shard: [
            artifacts.write_frame(asset, pl.DataFrame({"row": [0]}), {}, shard)[0]
            for asset in (decontamination.NAME, image_hashes.IMAGE_HASHES)
        ]
        for shard in ("a.jsonl", "b.jsonl")
    }
    (bench.pool / "b.jsonl").unlink()
    bench.refresh()
    assert Kind.GONE_SHARDS in counts(cleaned(bench))
    assert [path.exists() for path in kept["a.jsonl"]] == [True, True]
    assert [path.exists() for path in kept["b.jsonl"]] == [False, False]


def test_the_table_of_a_killed_search_goes_after_the_retention_time(bench: Bench) -> None:
    embeddings = bench.storage.embeddings(str(bench.store))
    before = embeddings.table_names()
    killed = search_table(embeddings, 2, [np.eye(2, dtype=np.float32)], exact_up_to=2)
    killed.__enter__()  # and never left
    assert embeddings.table_names() == {*before, SEARCH_TABLE}
    assert told(cleaned(bench, days=7).kept)[Kind.UNFINISHED] == {"the retention time has not passed": 1}
    assert counts(cleaned(bench)) == {Kind.UNFINISHED: 1}
    assert embeddings.table_names() == before


def test_a_shard_that_comes_back_begins_anew_when_it_leaves_again(
    bench: Bench, set_clock: Callable[[float], None], tmp_path: Path
) -> None:
    shutil.move(bench.pool / "a.jsonl", tmp_path / "a.jsonl")
    bench.refresh()
    set_clock(1)
    cleaned(bench, days=7)
    shutil.move(tmp_path / "a.jsonl", bench.pool / "a.jsonl")
    assert bench.refresh().embedded == []
    set_clock(2)
    assert cleaned(bench, days=7).kept == ()
    (bench.pool / "a.jsonl").unlink()
    bench.refresh()
    set_clock(9)
    assert cleaned(bench, days=7).removed == ()
    set_clock(17)
    assert Kind.GONE_SHARDS in counts(cleaned(bench, days=7))


def test_notes_from_a_clock_that_was_ahead_delay_and_hasten_nothing(
    bench: Bench, set_clock: Callable[[float], None]
) -> None:
    (bench.pool / "a.jsonl").unlink()
    bench.refresh()
    set_clock(1000)
    cleaned(bench, days=7)
    set_clock(10)
    assert cleaned(bench, days=7).removed == ()
    set_clock(16)
    assert cleaned(bench, days=7).removed == ()
    set_clock(18)
    assert Kind.GONE_SHARDS in counts(cleaned(bench, days=7))


def test_a_shard_that_no_refresh_has_missed_yet_stays(bench: Bench) -> None:
    (bench.pool / "a.jsonl").unlink()
    before = bench.files()
    assert told(cleaned(bench).kept) == {
        Kind.GONE_SHARDS: {"no refresh has seen yet that it left the pool": 1}
    }
    with open_instance(bench.selection) as instance:
        instance.delete_dynamic_partition("bench_shards", "a.jsonl")
    assert told(cleaned(bench).kept) == {Kind.GONE_SHARDS: {"the basis holds it, until the next refresh": 1}}
    assert bench.files() == before


def test_names_that_are_too_long_to_be_decoded_are_told_apart(
    make_pool: Callable[..., Path], tmp_path: Path, demo_vlm: Path
) -> None:
    here, gone = ("한국어 데이터 " * 4 + f"{number}.jsonl" for number in (1, 2))
    bench = Bench(make_pool({here: 3, gone: 3}), tmp_path / "store", demo_vlm)
    bench.refresh()
    (bench.pool / gone).unlink()
    bench.refresh()
    for shard in (here, gone):
        bench.artifacts.write_frame(reuse.SET_ASIDE, pl.DataFrame(), {}, reuse._part(shard, 0))
    report = cleaned(bench)
    assert counts(report) == {Kind.SET_ASIDE: 1, Kind.GONE_SHARDS: 1, Kind.LOCKS: 2}
    assert told(report.kept) == {Kind.SET_ASIDE: {"the shard's next embedding goes on from them": 1}}
    assert len(list(bench.store.glob("lance/*"))) == 1
    assert_up_to_date(bench)


# Tables of other models


def test_tables_of_another_model_go_once_that_has_lasted(
    bench: Bench, set_clock: Callable[[float], None]
) -> None:
    bench.options["attention_mass"] = 0.7
    # Not run yet: what the declared model's tables are is not known, and receipts name the old ones.
    assert cleaned(bench).removed == ()
    bench.refresh()
    vectors = bench.vectors()
    assert len(list(bench.store.glob("lance/*"))) == 4
    set_clock(30)
    assert told(cleaned(bench, days=7).kept) == {Kind.OTHER_MODELS: {"the retention time has not passed": 2}}
    set_clock(38)
    before = results_size(bench)
    report = cleaned(bench, days=7)
    assert counts(report) == {Kind.OTHER_MODELS: 2}
    assert abs(before - results_size(bench) - report.bytes_freed) < 200
    assert len(list(bench.store.glob("lance/*"))) == 2
    np.testing.assert_equal(bench.vectors(), vectors)
    assert_up_to_date(bench)


def test_a_shard_that_keeps_its_vectors_of_the_last_model_keeps_its_table(bench: Bench) -> None:
    (bench.pool / "a.jsonl").write_bytes(b"\x00\x01 not rows")
    bench.options["attention_mass"] = 0.7
    bench.refresh()
    assert counts(cleaned(bench)) == {Kind.OTHER_MODELS: 1}
    table, _ = receipts.recorded_table(bench.artifacts, "a.jsonl")
    assert table_folder(bench, table.table).exists()


def test_tables_whose_receipt_is_damaged_or_gone_stay(bench: Bench) -> None:
    bench.options["attention_mass"] = 0.7
    bench.refresh()
    (bench.store / "attention_embeddings" / "a_2ejsonl.json").write_text("{")
    (bench.store / "attention_embeddings" / "b_2ejsonl.json").unlink()
    report = cleaned(bench)
    assert counts(report) == {Kind.OTHER_MODELS: 1}  # of b.jsonl
    assert told(report.kept) == {
        Kind.OTHER_MODELS: {"its shard's receipt cannot be read; the next refresh replaces that": 1}
    }
    assert sorted(bench.refresh().embedded) == ["a.jsonl", "b.jsonl"]


def test_nothing_is_another_models_while_the_declared_one_is_unknown(bench: Bench) -> None:
    bench.options["attention_mass"] = 0.7
    bench.refresh()
    for damage in ("[]", "{"):
        for card in (bench.store / "model_cards").iterdir():
            card.write_text(damage)
        report = cleaned(bench)
        assert report.removed == ()
        assert told(report.kept) == {
            Kind.OTHER_MODELS: {"the declared model is not known before its first refresh": 2}
        }


# What killed processes leave behind


def aged(path: Path, days: float) -> Path:
    at = time.time() - days * DAY
    os.utime(path, (at, at))
    return path


def test_unfinished_files_go_when_they_are_old(bench: Bench) -> None:
    table, _ = receipts.recorded_table(bench.artifacts, "a.jsonl")
    data = table_folder(bench, table.table) / "data"
    old, young, future = [], [], []
    for files, days in ((old, 8), (young, 6), (future, -3)):
        for number, folder in enumerate((bench.store / "raw_samples", bench.store / "training_dataset")):
            path = folder / f".writing-{len(files)}{number}{days % 10}{'0' * 29}"
            path.write_bytes(b"half")
            files.append(aged(path, days))
        path = data / f".tmp{days % 10}abcd"
        path.write_bytes(b"half a table")
        files.append(aged(path, days))
    mine = bench.store / "raw_samples" / ".writing-by-hand"
    mine.write_bytes(b"")
    aged(mine, 100)
    report = cleaned(bench, days=7)
    assert counts(report) == {Kind.UNFINISHED: 3}
    assert report.bytes_freed == 4 + 4 + 12
    assert [path.exists() for path in (*old, *young, *future, mine)] == [False] * 3 + [True] * 7
    assert_up_to_date(bench)


def test_data_files_that_were_never_committed_go_when_their_table_has_long_been_left_alone(
    bench: Bench,
) -> None:
    table, _ = receipts.recorded_table(bench.artifacts, "a.jsonl")
    folder, vectors = table_folder(bench, table.table), bench.vectors()
    (committed,) = (folder / "data").glob("*.lance")
    orphan = folder / "data" / f"{'0' * 50}.lance"
    shutil.copy(committed, orphan)
    assert told(cleaned(bench, days=7).kept) == {Kind.UNFINISHED: {"the retention time has not passed": 1}}
    for path in folder.rglob("*"):
        aged(path, 8)
    report = cleaned(bench, days=7)
    assert (counts(report), report.bytes_freed) == ({Kind.UNFINISHED: 1}, committed.stat().st_size)
    assert not orphan.exists()
    np.testing.assert_equal(bench.vectors(), vectors)
    assert_up_to_date(bench)


def test_parts_set_aside_go_with_their_table_committed_and_stay_while_they_are_of_use(bench: Bench) -> None:
    def parts(shard: str, days: float) -> None:
        for number in (0, 1):
            path, _ = bench.artifacts.write_frame(
                reuse.SET_ASIDE, pl.DataFrame({"x": [1]}), {}, reuse._part(shard, number)
            )
            aged(Path(path.path), days)

    for shard, days in (("a.jsonl", 8), ("b.jsonl", 8), ("gone.jsonl", 8)):
        parts(shard, days)
    aged(bench.store / "attention_embeddings" / "a_2ejsonl.json", 7.5)
    aged(bench.store / "attention_embeddings" / "b_2ejsonl.json", 9)
    report = cleaned(bench, days=7)
    assert told(report.removed) == {
        Kind.SET_ASIDE: {"the shard's table is committed": 2, "its shard left the pool": 2}
    }
    assert told(report.kept) == {Kind.SET_ASIDE: {"the shard's next embedding goes on from them": 2}}
    assert sorted(path.name[:10] for path in (bench.store / reuse.SET_ASIDE).iterdir()) == [
        "000000_2fb",
        "000001_2fb",
    ]
    assert_up_to_date(bench)


def test_retired_moments_go_when_the_totals_hold_them_no_longer(bench: Bench) -> None:
    arrays, header = bench.artifacts.read_arrays("embedding_moments", "a.jsonl")
    held = pool_moments.retired_name("a.jsonl", header["data_version"])
    for name in (held, pool_moments.retired_name("a.jsonl", "older")):
        path, _ = bench.artifacts.write_arrays(pool_moments.RETIRED, arrays, header, name)
        aged(Path(path.path), 8)
    report = cleaned(bench, days=7)
    assert counts(report) == {Kind.RETIRED: 1}
    assert bench.artifacts.exists(pool_moments.RETIRED, held, suffix=".safetensors")
    assert_up_to_date(bench)


# Killed, and elsewhere


class Killed(BaseException):
    """Nothing in the code under test catches it."""


@pytest.fixture(scope="module")
def everything(refreshed: Path, demo_vlm: Path) -> Path:
    """A copy with a shard that left, tables of another model, an old version and leftovers.

    The file of the shard that left lies beside the pool.
    """
    bench = put_in_place(refreshed.with_name("copy"), refreshed, demo_vlm)
    write_pool_shard(bench.pool, "c.jsonl", 3, seed=5000)
    bench.options["attention_mass"] = 0.7
    bench.refresh()
    replaced_once(bench)
    shutil.move(bench.pool / "c.jsonl", refreshed / "c.jsonl")
    bench.refresh()
    for number in (0, 1):
        path, _ = bench.artifacts.write_frame(
            reuse.SET_ASIDE, pl.DataFrame({"x": [1]}), {}, reuse._part("a.jsonl", number)
        )
        aged(Path(path.path), 1)
    (bench.store / "raw_samples" / f".writing-{'0' * 32}").touch()
    copy = refreshed.with_name("everything")
    shutil.copytree(refreshed, copy)
    return copy


@pytest.fixture
def full_bench(everything: Path, refreshed: Path, demo_vlm: Path) -> Bench:
    """That copy put in place."""
    bench = put_in_place(everything, refreshed, demo_vlm)
    bench.options["attention_mass"] = 0.7
    return bench


def test_a_dry_run_tells_the_same_and_deletes_nothing(full_bench: Bench) -> None:
    before = full_bench.files()
    rehearsed = cleaned(full_bench, dry_run=True)
    assert full_bench.files() == before
    report = cleaned(full_bench)
    assert rehearsed.dry_run
    assert replace(rehearsed, dry_run=False) == report
    assert counts(report) == {
        Kind.UNFINISHED: 1,
        Kind.SET_ASIDE: 2,
        Kind.GONE_SHARDS: 1,
        Kind.OTHER_MODELS: 2,
        Kind.OLD_VERSIONS: 1,
        Kind.LOCKS: 2,
    }
    assert report.to_json()["bytes_freed"] == sum(group["bytes"] for group in report.to_json()["removed"])
    assert_up_to_date(full_bench)


def test_a_cleaning_that_is_killed_anywhere_leaves_a_whole_store_and_goes_on(
    full_bench: Bench, everything: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = full_bench
    cleaned(bench)
    expected, vectors = bench.files().keys(), bench.vectors()
    killed = {"after": 0, "dropping": False}

    def counted(original: Callable[..., Any], *, drops: bool = False) -> Any:
        def deleting(*arguments: Any, **options: Any) -> Any:
            if killed["after"] == 0:
                killed["dropping"] = drops
                if drops:  # a table is a folder of files, of which some are gone
                    tables, table = arguments
                    shutil.rmtree(Path(str(tables.store.folder)) / f"{table}.lance" / "_versions")
                raise Killed
            killed["after"] -= 1
            return original(*arguments, **options)

        return deleting

    n_kills, n_drops = 0, 0
    while True:
        shutil.rmtree(bench.store)
        shutil.copytree(everything / "store", bench.store)
        killed.update(after=n_kills, dropping=False)
        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "unlink", counted(pathlib.Path.unlink))
            patch.setattr(
                table_versions.TableVersions, "drop", counted(table_versions.TableVersions.drop, drops=True)
            )
            patch.setattr(table_versions.TableVersions, "prune", counted(table_versions.TableVersions.prune))
            try:
                cleaned(bench)
            except Killed:
                n_kills += 1
            else:
                break
        n_drops += killed["dropping"]
        if killed["dropping"] or n_kills % 5 == 0:
            # That which is half removed is made again as if it had never been, when it is wanted again.
            shutil.copy2(everything / "c.jsonl", bench.pool / "c.jsonl")
            assert bench.refresh().failed == {}
            assert len(bench.vectors()) == len(vectors) + 3
            (bench.pool / "c.jsonl").unlink()
        else:
            cleaned(bench)
            assert bench.files().keys() == expected
    assert (n_kills, n_drops) == (15, 3)
    np.testing.assert_equal(bench.vectors(), vectors)
    assert_up_to_date(bench)


def test_another_selections_store_is_not_touched(bench: Bench, tmp_path: Path, demo_vlm: Path) -> None:
    other = Bench(bench.pool, tmp_path / "other store", demo_vlm)
    other.options["name"] = "other"
    other.refresh()
    leftover = other.store / "raw_samples" / f".writing-{'0' * 32}"
    leftover.touch()
    replaced_once(bench)
    before = {path: path.stat().st_mtime_ns for path in other.store.rglob("*") if path.is_file()}
    assert cleaned(bench).removed != ()
    assert {path: path.stat().st_mtime_ns for path in other.store.rglob("*") if path.is_file()} == before


# The job


def test_the_job_tells_in_the_ui_what_went_and_leaves_nothing_to_refresh(bench: Bench) -> None:
    replaced_once(bench)
    defs = build_defs([bench.selection], {"storage": bench.storage})
    job = defs.resolve_job_def("bench_maintenance")
    with open_instance(bench.selection) as instance:
        result = job.execute_in_process(
            instance=instance,
            run_config={"ops": {"bench_maintenance_op": {"config": {"retention_days": 0}}}},
        )
        assert result.success
        (record,) = instance.fetch_observations(bench.selection.key("attention_embeddings"), limit=5).records
    observation = record.asset_observation
    assert observation is not None
    metadata = observation.metadata
    assert metadata["bytes_freed"].value > 0  # type: ignore[operator]
    (removed,) = metadata["removed"].records  # type: ignore[union-attr]
    assert (removed.data["kind"], removed.data["count"]) == (Kind.OLD_VERSIONS.value, 1)
    assert_up_to_date(bench)
