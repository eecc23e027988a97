"""Two processes on one store: one refresh at a time, one writer per shard, and every sample embedded once."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import dagster as dg
import pytest

from scalselect_assets.deployment import build_defs
from scalselect_assets.recording.partitions import shards_name
from scalselect_assets.resources.locks import StoreBusyError
from tests.faults.children import PATIENCE, Children
from tests.faults.invariants import contents, expected, incomplete, same
from tests.faults.known_pool import FaultBench, Pool, refresh
from tests.faults.standin import StandIn

SHARD = "a.jsonl"
SHARD_ASSETS = ("raw_samples", "attention_embeddings", "embedding_moments")


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    pool = Pool(tmp_path / "pool")
    pool.add(SHARD, 8)
    return pool


def assert_shard_is_complete(bench: FaultBench, pool: Pool) -> None:
    found, new = contents(bench), expected(pool)
    assert all(same(found.get(name), new[name]) for name in (f"{asset}[{SHARD}]" for asset in SHARD_ASSETS))


def told(folder: Path, name: str) -> Path:
    """A file by which processes tell each other where they are."""
    return folder / f"{name}.numbers"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.005)


def work_slowly(folder: Path, name: str) -> None:
    """Tell when the third sample is reached, and go on with it when somebody says so."""
    StandIn.ledger = folder / "ledger"

    def before_each(place: int) -> None:
        if place == 2:
            told(folder, f"{name} is embedding").touch()
            wait_for(told(folder, "go on"))

    StandIn.before_each = before_each


def refresh_slowly(pool: Path, store: Path, folder: Path, name: str) -> list[str]:
    work_slowly(folder, name)
    return refresh(pool, store).embedded


def materialize_slowly(pool: Path, store: Path, folder: Path, name: str) -> bool:
    """One shard's assets by their job, as a person or a daemon with a Dagster instance of its own runs it."""
    work_slowly(folder, name)
    bench = FaultBench(pool, store)
    selection = bench.selection
    defs = build_defs([selection], {"storage": bench.storage, "vlm": bench.vlm})
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(shards_name(selection.name), [SHARD])
        told(folder, f"{name} is starting").touch()
        return (
            defs.resolve_job_def(selection.job_name("assets"))
            .execute_in_process(
                instance=instance,
                asset_selection=[selection.key(asset) for asset in SHARD_ASSETS],
                partition_key=SHARD,
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
            .success
        )


def embedded(folder: Path) -> Counter[str]:
    """How often each sample was embedded, by all processes."""
    return Counter(line.split(" ", 1)[1] for line in (folder / "ledger").read_text().splitlines())


def test_a_second_refresh_is_refused_by_the_name_of_the_first(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    bench = FaultBench(pool.folder, tmp_path / "store")
    first = children.start(refresh_slowly, bench.pool, bench.store, tmp_path, "first")
    wait_for(told(tmp_path, "first is embedding"))
    with pytest.raises(StoreBusyError, match=f"process {first} on .* is at work on .*store"):
        bench.refresh()
    told(tmp_path, "go on").touch()
    assert children.wait(first).value == [SHARD]
    assert incomplete(bench, pool) == []


def test_two_processes_that_materialize_one_shard_embed_its_rows_once(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    bench = FaultBench(pool.folder, tmp_path / "store")
    first, second = (
        children.start(materialize_slowly, bench.pool, bench.store, tmp_path, name) for name in ("1", "2")
    )
    wait_for(told(tmp_path, "1 is starting"))
    wait_for(told(tmp_path, "2 is starting"))
    told(tmp_path, "go on").touch()
    assert children.wait(first).value
    assert children.wait(second).value
    assert_shard_is_complete(bench, pool)
    assert sorted(embedded(tmp_path).values()) == [1] * len(pool.vectors(SHARD))


def test_a_refresh_and_a_person_who_materializes_the_same_shard_embed_its_rows_once(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    bench = FaultBench(pool.folder, tmp_path / "store")
    first = children.start(refresh_slowly, bench.pool, bench.store, tmp_path, "refresh")
    wait_for(told(tmp_path, "refresh is embedding"))
    second = children.start(materialize_slowly, bench.pool, bench.store, tmp_path, "person")
    wait_for(told(tmp_path, "person is starting"))
    time.sleep(0.5)  # time to do harm in, if it could
    assert not told(tmp_path, "person is embedding").exists()
    told(tmp_path, "go on").touch()
    assert children.wait(first).value == [SHARD]
    assert children.wait(second).value
    assert incomplete(bench, pool) == []
    assert sorted(embedded(tmp_path).values()) == [1] * len(pool.vectors(SHARD))


def test_whoever_waits_for_a_writer_that_is_killed_goes_on_with_its_rows(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    bench = FaultBench(pool.folder, tmp_path / "store")
    first = children.start(materialize_slowly, bench.pool, bench.store, tmp_path, "first")
    wait_for(told(tmp_path, "first is embedding"))
    second = children.start(materialize_slowly, bench.pool, bench.store, tmp_path, "second")
    wait_for(told(tmp_path, "second is starting"))
    told(tmp_path, "go on").touch()
    os.kill(first, signal.SIGKILL)
    assert children.wait(first).killed
    assert children.wait(second).value
    assert_shard_is_complete(bench, pool)
    calls = embedded(tmp_path)
    assert len(calls) == len(pool.vectors(SHARD))
    assert calls.total() <= len(calls) + 1  # the one that the first had in hand
