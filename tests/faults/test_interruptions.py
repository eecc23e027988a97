"""Interruptions at the worst moments: each record is completed, and no thread waits in vain."""

import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._utils.interrupts import capture_interrupts
from sqlalchemy import Engine, ExceptionContext, event

from scalselect_assets.deployment import build_defs, open_instance
from scalselect_assets.explain.sample_lineage import trace
from scalselect_assets.operations.cleaning import clean
from scalselect_assets.operations.jobs import maintenance_job, nightly_schedule, refresh_job
from scalselect_assets.operations.sensors import discovery_sensor
from scalselect_assets.operations.staleness import Staleness
from scalselect_assets.pool.discovery import discover
from scalselect_assets.subspace.verification import verify_job
from tests.bypasses import bypasses
from tests.faults.children import Children
from tests.faults.invariants import contents, expected, same
from tests.faults.known_pool import FaultBench, Pool, refresh
from tests.faults.standin import StandIn, load_real_encoder
from tests.method.samples import question, read_image

N_INTERRUPTIONS = 12


@contextmanager
def _interrupted_before(place: int) -> Iterator[list[int]]:
    """Interrupt before one of the writes to Dagster's records; yields the places of those that were done."""
    begun, done = [0], list[int]()

    def writes(*of: Any) -> bool:
        return not of[2].startswith(("SELECT", "PRAGMA"))

    def before(*of: Any) -> None:
        if writes(*of):
            begun[0] += 1
            if begun[0] == place:
                signal.raise_signal(signal.SIGINT)

    def after(*of: Any) -> None:
        if writes(*of):
            done.append(begun[0])

    def refused(error: ExceptionContext) -> None:
        # Dagster inserts the key of an asset that it may know, and updates it then.
        if isinstance(error.original_exception, sqlite3.IntegrityError):
            done.append(begun[0])

    listeners = {"before_cursor_execute": before, "after_cursor_execute": after, "handle_error": refused}
    for name, listener in listeners.items():
        event.listen(Engine, name, listener)
    try:
        yield done
    finally:
        for name, listener in listeners.items():
            event.remove(Engine, name, listener)


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


def test_what_is_being_recorded_is_complete_before_a_refresh_stops(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    children.run(refresh, pool.folder, store)
    pool.change("a.jsonl", [0])
    writes, how, unfinished = children.run(interrupted_refresh, pool.folder, store, -1).value
    assert (how, unfinished) == ("to its end", [])
    n_writes = len(writes) - 20  # a refresh has some more or some fewer
    places = range(1, n_writes, n_writes // N_INTERRUPTIONS)
    assert len(places) >= N_INTERRUPTIONS
    for place in places:
        pool.change("a.jsonl", [0])
        done, how, unfinished = children.run(interrupted_refresh, pool.folder, store, place).value
        assert (place in done, how, unfinished) == (True, "interrupted", []), place
    children.run(refresh, pool.folder, store)
    found, due = contents(FaultBench(pool.folder, store)), expected(pool)
    assert [name for name in due if not same(found.get(name), due[name])] == []


def bypassed(pool: Path, store: Path) -> list[str]:
    """In a child: the statements of jobs, sensors and commands that an interruption would stop half-way."""
    bench = FaultBench(pool, store)
    selection, storage = bench.selection, bench.storage
    defs = build_defs([selection], {"storage": storage, "vlm": bench.vlm})
    # A run that is executed in process has no repository, in which the refresh looks up the asset job.
    dg.OpExecutionContext.repository_def = property(lambda _: defs.get_repository_def())  # type: ignore[assignment,method-assign]
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    with bypasses() as found:
        bench.refresh()
        with open_instance(selection) as instance:
            for job in (refresh_job(selection), maintenance_job(selection), verify_job(selection)):
                defs.resolve_job_def(job.name).execute_in_process(instance=instance, run_config=quiet)
            Staleness(selection, storage, bench.vlm, instance).pending(
                discover(storage.samples(selection.source, None, selection.store), bench.artifacts)
            )
            trace(selection, storage, instance, "a.jsonl#0")
            clean(selection, storage, instance, retention=timedelta(0), dry_run=True)
            with dg.build_sensor_context(instance=instance, resources={"storage": storage}) as context:
                discovery_sensor(selection)(context)
            with dg.build_schedule_context(instance=instance, resources={"storage": storage}) as tick:
                nightly_schedule(selection)(tick)
    return found


def test_nothing_asks_or_reports_to_dagster_where_an_interruption_would_stop_it(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    assert children.run(bypassed, pool.folder, tmp_path / "store").value == []


def terminated_in_the_background(pool: Path, store: Path) -> tuple[str, list[str], list[object]]:
    """In a child that ignores Ctrl-C: a termination while the model computes.

    Returns how the refresh ended, the runs that have not ended, and what the signals do after it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    bench, how = FaultBench(pool, store), "to its end"

    def terminate(_place: int) -> None:
        signal.raise_signal(signal.SIGTERM)

    StandIn.before_each = terminate
    try:
        bench.refresh()
    except dg.DagsterExecutionInterruptedError:
        how = "interrupted"
    after: list[object] = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with open_instance(bench.selection) as instance:
        return how, [run.run_id for run in instance.get_runs() if not run.is_finished], after


def test_a_refresh_in_the_background_ends_at_a_termination(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    ended = children.run(terminated_in_the_background, pool.folder, tmp_path / "store").value
    assert ended == ("interrupted", [], [signal.SIG_IGN, signal.SIG_DFL])


def interrupted_wait(model: Path) -> str:
    """In a child: an interruption as the lock of a future is taken, whose thread is still at work."""
    encoder, enter = load_real_encoder(model), threading.Condition.__enter__

    def interrupted(condition: threading.Condition) -> bool:
        entered = enter(condition)
        if sys._getframe(1).f_code.co_name == "result":
            signal.raise_signal(signal.SIGINT)
        return entered

    def read_slowly(reference: str) -> bytes:
        time.sleep(0.3)
        return read_image(reference)

    threading.Condition.__enter__ = interrupted  # type: ignore[method-assign]
    try:
        encoder.encode([question("Why?", "1")], read_slowly)
    except KeyboardInterrupt:
        return "interrupted"
    return "to its end"


def test_an_interruption_leaves_no_thread_waiting_for_a_lock(children: Children, demo_vlm: Path) -> None:
    assert children.run(interrupted_wait, demo_vlm).value == "interrupted"
