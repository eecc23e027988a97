"""A refresh that is interrupted while it tells Dagster something: that is told, and the refresh stops."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._utils.interrupts import capture_interrupts
from sqlalchemy import Engine, event

from scalselect_assets.deployment import open_instance
from tests.faults.bench import FaultBench, Pool, refresh
from tests.faults.children import Children
from tests.faults.invariants import contents, expected, same

N_INTERRUPTIONS = 16


@contextmanager
def _interrupted_before(place: int) -> Iterator[list[int]]:
    """Interrupt before one of the writes to Dagster's records; yields the places of those that were done."""
    begun, done = [0], list[int]()

    def before(*of: Any) -> None:
        if not of[2].startswith(("SELECT", "PRAGMA")):
            begun[0] += 1
            if begun[0] == place:
                signal.raise_signal(signal.SIGINT)

    def after(*of: Any) -> None:
        if not of[2].startswith(("SELECT", "PRAGMA")):
            done.append(begun[0])

    event.listen(Engine, "before_cursor_execute", before)
    event.listen(Engine, "after_cursor_execute", after)
    try:
        yield done
    finally:
        event.remove(Engine, "before_cursor_execute", before)
        event.remove(Engine, "after_cursor_execute", after)


def interrupted_refresh(pool: Path, store: Path, place: int) -> tuple[list[int], str, list[str]]:
    """In a child: the writes that were done, how the refresh ended, and the runs that have not ended."""
    bench, how = FaultBench(pool, store), "to its end"
    # As Dagster's process of a run has it: interruptions wait, except in what an op computes.
    with _interrupted_before(place) as done, capture_interrupts():
        try:
            with dg.raise_execution_interrupts():
                bench.refresh()
        except dg.DagsterExecutionInterruptedError:
            how = "interrupted"
    with open_instance(bench.selection) as instance:
        return done, how, [run.run_id for run in instance.get_runs() if not run.is_finished]


def test_what_is_being_told_to_dagster_is_told_before_a_refresh_stops(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    children.run(refresh, pool.folder, store)
    pool.change("a.jsonl", [0])
    writes, how, unfinished = children.run(interrupted_refresh, pool.folder, store, -1).value
    assert (how, unfinished) == ("to its end", [])
    places = range(1, len(writes) + 1, max(len(writes) // N_INTERRUPTIONS, 1))
    assert len(places) >= N_INTERRUPTIONS
    for place in places:
        pool.change("a.jsonl", [0])
        done, how, unfinished = children.run(interrupted_refresh, pool.folder, store, place).value
        assert (place in done, how, unfinished) == (True, "interrupted", []), place
    children.run(refresh, pool.folder, store)
    found, due = contents(FaultBench(pool.folder, store)), expected(pool)
    assert [name for name in due if not same(found.get(name), due[name])] == []
