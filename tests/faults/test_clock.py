"""Clocks that are wrong or jump: versions are compared for equality, never by time."""

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import dagster._time
import pytest

from scalselect_assets.operations.refresh import RefreshReport
from tests.faults.children import Children
from tests.faults.invariants import incomplete
from tests.faults.known_pool import FaultBench, Pool

DAY = 86_400.0


def refresh_at(bench: FaultBench, ahead: Callable[[], float]) -> RefreshReport:
    """A refresh in a process whose clock is ahead by some seconds, which may change from call to call."""
    now = time.time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: now() + ahead())
        patch.setattr(dagster._time, "_mockable_get_current_timestamp", lambda: now() + ahead())
        patch.setattr(
            dagster._time,
            "_mockable_get_current_datetime",
            lambda: datetime.fromtimestamp(now() + ahead(), tz=UTC),
        )
        return bench.refresh()


def refresh_under_jumping_clocks(pool: Pool, store: Path) -> list[list[str]]:
    """What refreshes run when the clock is a day behind the last one, and when it jumps while they run."""
    bench, ran = FaultBench(pool.folder, store), []
    calls = count()
    clocks = [
        lambda: 0.0,
        lambda: -DAY,
        lambda: 2 * DAY,
        lambda: -3 * DAY if next(calls) % 2 else DAY,
    ]
    for clock in clocks:
        pool.change("a.jsonl", [0])
        assert "a.jsonl" in refresh_at(bench, clock).embedded
        assert incomplete(bench, pool) == []
        ran += [refresh_at(bench, later).runs for later in clocks[:2]]
    return ran


def test_a_clock_that_jumps_between_and_during_refreshes_neither_hides_nor_repeats_work(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    ran = children.run(refresh_under_jumping_clocks, pool, tmp_path / "store").value
    assert ran == [[]] * 8


def refresh_files_of_any_time(pool: Pool, store: Path) -> list[list[str]]:
    """What is embedded of a shard from the future, and of an older one of equal size in its place."""
    bench, embedded = FaultBench(pool.folder, store), []
    file = pool.folder / "a.jsonl"
    for seconds in (365 * DAY, 400 * DAY, -365 * DAY, -400 * DAY):
        size = file.stat().st_size
        pool.change("a.jsonl", [0])
        os.utime(file, (time.time() + seconds, time.time() + seconds))
        assert file.stat().st_size in {size, size + 3}
        embedded.append(bench.refresh().embedded)
        assert incomplete(bench, pool) == []
        assert bench.refresh().runs == []
    return embedded


def test_files_from_the_future_and_from_the_past_are_changes_like_any_other(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    first, *others = children.run(refresh_files_of_any_time, pool, tmp_path / "store").value
    assert first == ["a.jsonl", "b.jsonl"]
    assert others == [["a.jsonl"]] * 3
