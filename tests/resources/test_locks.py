"""Locks between processes: who waits, who is refused, and that a dead holder holds nothing."""

import multiprocessing
import os
import signal
import stat
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from scalselect_assets.resources.locks import StoreBusyError, StoreLocks
from scalselect_assets.resources.storage import StorageResource

SPAWN = multiprocessing.get_context("spawn")


def unexpected(message: str) -> None:
    raise AssertionError(message)


def hold(folder: Path, work: str | None, held: Path) -> None:
    """Hold a lock, or the refresh's where ``work`` is None, until killed."""
    locks = StoreLocks(folder)
    with locks.refreshing() if work is None else locks.writing(work, unexpected):
        held.touch()
        signal.pause()


@pytest.fixture
def holder(processes: None, tmp_path: Path) -> Callable[[str | None], BaseProcess]:
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


@pytest.mark.parametrize("planted", ["a link", "a second name", "a link to the folder"])
def test_what_a_planted_link_points_to_is_left_alone(tmp_path: Path, planted: str) -> None:
    victim, folder = tmp_path / "victim", tmp_path / ".locks"
    victim.write_text("precious")
    if planted == "a link to the folder":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        lock = folder / "refresh.lock"
        lock.symlink_to(victim) if planted == "a link" else lock.hardlink_to(victim)
    with (
        pytest.raises(OSError, match="what it leads to is left alone") as raised,
        StoreLocks(folder).refreshing(),
    ):
        pass
    assert str(folder / "refresh.lock") in str(raised.value)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "elsewhere" / "refresh.lock").exists()


def test_a_pipe_in_the_place_of_a_lock_is_refused_without_waiting(tmp_path: Path) -> None:
    (tmp_path / ".locks").mkdir()
    os.mkfifo(tmp_path / ".locks" / "refresh.lock")
    with pytest.raises(OSError, match="no file"), StoreLocks(tmp_path / ".locks").refreshing():
        pass


def test_a_private_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "locks"
    with StoreLocks(folder, private=True).refreshing():
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o770)
    with (
        pytest.raises(PermissionError, match="not this user's own"),
        StoreLocks(folder, private=True).refreshing(),
    ):
        pass


def test_a_remote_store_has_its_locks_in_a_private_folder_of_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    locks = StorageResource().locks("memory://somewhere/store")
    with locks.refreshing():
        pass
    (folder,) = tmp_path.iterdir()
    assert (folder, locks.private) == (locks.folder, True)
    assert str(os.geteuid()) in folder.name
