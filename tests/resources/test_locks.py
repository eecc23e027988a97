"""Locks between processes: who waits, who is refused, and that a dead holder holds nothing."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from scalselect_assets.resources.locks import StoreBusyError, StoreLocks

SPAWN = multiprocessing.get_context("spawn")


def unexpected(message: str) -> None:
    raise AssertionError(message)


def hold(folder: Path, work: str | None, held: Path) -> None:
    """Hold a lock, or the refresh's where ``work`` is None, until killed."""
    locks = StoreLocks(folder)
    with locks.refreshing() if work is None else locks.writing(work, unexpected):
        held.touch()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Callable[[str | None], BaseProcess]:
    def start(work: str | None) -> BaseProcess:
        held = tmp_path / "held"
        process = SPAWN.Process(target=hold, args=(tmp_path / ".locks", work, held), daemon=True)
        process.start()
        while not held.exists():
            assert process.is_alive()
            time.sleep(0.01)
        return process

    return start


def kill(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_writers_of_other_work_do_not_meet(tmp_path: Path) -> None:
    locks = StoreLocks(tmp_path / ".locks")
    with locks.writing("a", unexpected), locks.writing("b", unexpected), locks.refreshing():
        pass


def test_names_of_work_cannot_be_taken_for_the_store_s_own_locks(tmp_path: Path) -> None:
    locks = StoreLocks(tmp_path / ".locks")
    with locks.writing("store", unexpected), locks.writing("refresh", unexpected), locks.refreshing():
        pass


def test_a_second_writer_waits_until_the_first_is_dead(
    tmp_path: Path, holder: Callable[[str | None], BaseProcess]
) -> None:
    process = holder("a/b.jsonl")
    told: list[str] = []

    def on_wait(message: str) -> None:
        told.append(message)
        kill(process)

    with StoreLocks(tmp_path / ".locks").writing("a/b.jsonl", on_wait):
        pass
    assert len(told) == 1
    assert f"process {process.pid}" in told[0]


def test_a_second_refresh_is_refused_by_name_and_let_in_after_a_kill(
    tmp_path: Path, holder: Callable[[str | None], BaseProcess]
) -> None:
    locks, process = StoreLocks(tmp_path / ".locks"), holder(None)
    with pytest.raises(StoreBusyError, match=f"process {process.pid} on .* is at work"), locks.refreshing():
        pass
    kill(process)
    with locks.refreshing():
        pass


def test_cleaning_goes_alone(tmp_path: Path, holder: Callable[[str | None], BaseProcess]) -> None:
    locks = StoreLocks(tmp_path / ".locks")
    for work in ("a", None):
        process = holder(work)
        with pytest.raises(StoreBusyError), locks.alone():
            pass
        kill(process)
        (tmp_path / "held").unlink()
    told: list[str] = []
    with locks.alone():

        def on_wait(message: str) -> None:
            told.append(message)
            raise TimeoutError

        with pytest.raises(TimeoutError), locks.writing("a", on_wait):
            pass
    assert told
