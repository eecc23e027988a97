"""A disk that is full, and one that cannot be written: what is there stays, and the message says what to do.

The faults are real ones. A child mounts a small file system, or a read-only one, where only children see it.
Where a system does not allow that, limits and permissions of a process remain, which are tested in any case.
"""

import ctypes
import os
import random
import resource
import string
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from scalselect_assets.operations.summary import summary
from tests.faults.children import Children
from tests.faults.invariants import Content, contents, expected, incomplete, torn
from tests.faults.known_pool import FaultBench, Pool, problems
from tests.quick_dagster import closed_connections

PAGE = 4096
NO_SPACE = "No space left on device"


@pytest.fixture
def mounting(children: Children) -> Children:
    """Children that may mount."""
    if not children.may_mount:
        pytest.skip("no mounts of its own here; the limits and permissions of a process are tested instead")
    return children


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


def assert_healed(bench: FaultBench, pool: Pool) -> None:
    assert problems(bench) == []
    assert incomplete(bench, pool) == []


def assert_nothing_torn(bench: FaultBench, pool: Pool, before: dict[str, Content]) -> dict[str, Content]:
    after = contents(bench)
    assert torn(before, after, expected(pool)) == []
    return after


def leave_space(folder: Path, n_bytes: int) -> None:
    """Fill a file system up to some bytes."""
    filler = folder / "filler"
    filler.unlink(missing_ok=True)
    state = os.statvfs(folder)
    with filler.open("wb") as file:
        file.write(bytes(state.f_bavail * state.f_frsize - n_bytes))


def refresh_with_little_space(pool: Pool, store: Path, records: Path) -> list[list[str]]:
    """What refreshes say that each get somewhat further, Dagster's records being elsewhere."""
    store.mkdir()
    mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", store)
    (store / "dagster").symlink_to(records)
    bench = FaultBench(pool.folder, store)
    assert problems(bench) == []
    state = contents(bench)
    pool.change("a.jsonl", [1, 2])
    said = []
    for n_pages in range(16):
        leave_space(store, n_pages * PAGE)
        said.append(problems(bench))
        state = assert_nothing_torn(bench, pool, state)
        if not said[-1]:
            break
    (store / "filler").unlink()
    assert_healed(bench, pool)
    return said


def test_a_full_disk_leaves_old_or_new_and_is_told_by_its_place(
    mounting: Children, pool: Pool, tmp_path: Path
) -> None:
    (tmp_path / "records").mkdir()
    *refused, last = mounting.run(
        refresh_with_little_space, pool, tmp_path / "store", tmp_path / "records"
    ).value
    assert last == []
    assert len(refused) >= 3
    for (message,) in refused:
        assert NO_SPACE in message
        assert str(tmp_path / "store") in message
    in_assets = [message for (message,) in refused if message.startswith("shard a.jsonl failed")]
    assert in_assets
    assert all("the disk is full: free space" in message for message in in_assets)
    assert any("/raw_samples/" in message for message in in_assets)
    assert any("/lance/" in message for message in in_assets)


@closed_connections()
def refresh_without_space_for_records(pool: Pool, store: Path) -> list[str]:
    """What refreshes say where Dagster's own files lie on the full disk, and nothing else."""
    (store / "dagster").mkdir(parents=True)
    mount("-t", "tmpfs", "-o", "size=12m", "tmpfs", store / "dagster")
    bench = FaultBench(pool.folder, store)
    assert problems(bench) == []
    said = []
    for n_pages in (4, 150):
        state = contents(bench)
        pool.change("a.jsonl", [0])
        leave_space(store / "dagster", n_pages * PAGE)
        try:
            said += problems(bench)
        except Exception as error:  # noqa: BLE001 - of SQLite, which the caller judges
            said.append(repr(error))
        assert_nothing_torn(bench, pool, state)
        (store / "dagster" / "filler").unlink()
        assert_healed(bench, pool)
    return said


def test_records_that_cannot_be_written_cost_nothing_but_time(
    mounting: Children, pool: Pool, tmp_path: Path
) -> None:
    said = mounting.run(refresh_without_space_for_records, pool, tmp_path / "store").value
    assert len(said) == 2


@closed_connections()
def refresh_with_small_files(pool: Pool, store: Path) -> list[str]:
    """What a refresh says that may not write files as large as a shard's rows."""
    bench = FaultBench(pool.folder, store)
    assert problems(bench) == []
    state = contents(bench)
    letters = random.Random(0).choices(string.ascii_letters, k=3 * 2**20)
    pool.answers[pool.shards["a.jsonl"][1]] = "".join(letters)
    pool.change("a.jsonl", [])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 2**20, hard))
    said = problems(bench)
    assert_nothing_torn(bench, pool, state)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_healed(bench, pool)
    return said


def test_a_file_that_may_not_grow_leaves_the_old_one_and_is_told_by_its_place(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    (message,) = children.run(refresh_with_small_files, pool, tmp_path / "store").value
    assert message.startswith("shard a.jsonl failed: raw_samples[a.jsonl]: File too large")
    assert str(tmp_path / "store" / "raw_samples") in message


def mounted_read_only(place: Path) -> Callable[[], None]:
    mount("--bind", place, place)
    mount("-o", "remount,ro,bind", place)
    return lambda: subprocess.run(["umount", place], check=True) and None


def without_permission(place: Path) -> Callable[[], None]:
    """Take the right to write from the folders, and from root the right to do it nevertheless."""
    modes = {folder: folder.stat().st_mode for folder in [place, *place.rglob("*")] if folder.is_dir()}
    for folder in modes:
        folder.chmod(0o555)
    give_back = respect_permissions()

    def undo() -> None:
        give_back()
        for folder, mode in modes.items():
            folder.chmod(mode)

    return undo


def respect_permissions() -> Callable[[], None]:
    """Let this thread be refused what a user is refused, though it is root's; returns how to end that."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = (ctypes.c_uint32 * 2)(0x20080522, 0)  # of the call, and this thread
    held = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, of the first 32 and the rest
    assert libc.capget(version, held) == 0
    dropped = (ctypes.c_uint32 * 6)(*held)
    dropped[0] &= ~0b111  # to own any file, to write and to read any
    assert libc.capset(version, dropped) == 0
    return lambda: libc.capset(version, held) and None


def refresh_what_cannot_be_written(
    pool: Pool, store: Path, parts: list[str], forbid: Callable[[Path], Callable[[], None]]
) -> list[str]:
    """What refreshes say of a store of which one part after the other cannot be written, and nothing else."""
    store.mkdir()
    (store.parent / "records").mkdir()
    (store / "dagster").symlink_to(store.parent / "records")
    bench = FaultBench(pool.folder, store)
    assert problems(bench) == []
    state = contents(bench)
    pool.change("a.jsonl", [1])
    said = []
    for part in parts:
        allow = forbid(store / part)
        said += problems(bench)
        state = assert_nothing_torn(bench, pool, state)
        assert summary(bench.artifacts)["rows"] == 14
        allow()
    assert_healed(bench, pool)
    return said


def test_a_store_that_is_mounted_read_only_is_told_by_its_place_and_stays_as_it_is(
    mounting: Children, pool: Pool, tmp_path: Path
) -> None:
    store, parts = tmp_path / "store", [".", "raw_samples", "lance", "subspace_basis", "training_dataset"]
    said = mounting.run(refresh_what_cannot_be_written, pool, store, parts, mounted_read_only).value
    assert len(said) == len(parts)
    for part, message in zip(parts, said, strict=True):
        assert "Read-only file system" in message
        assert str(store / part) in message
        assert (
            "must be writable" if part == "." else "mount it for writing, or use another store"
        ) in message


def test_a_store_without_permission_to_write_is_told_by_its_place_and_stays_as_it_is(
    children: Children, pool: Pool, tmp_path: Path
) -> None:
    store, parts = tmp_path / "store", [".", "raw_samples", "subspace_basis"]
    said = children.run(refresh_what_cannot_be_written, pool, store, parts, without_permission).value
    assert len(said) == len(parts)
    for part, message in zip(parts, said, strict=True):
        assert "Permission denied" in message
        assert str(store / part) in message
        assert part == "." or "let this user read the pool and write the store" in message


def open_records_that_cannot_be_written(pool: Pool, store: Path) -> str:
    """What is said where Dagster's own files lie on a file system that is read-only."""
    bench = FaultBench(pool.folder, store)
    assert problems(bench) == []
    mounted_read_only(store / "dagster")
    try:
        return str(problems(bench))
    except Exception as error:  # noqa: BLE001 - whichever it is, its text is judged
        return str(error)


def test_records_that_cannot_be_written_are_told_by_their_place(
    mounting: Children, pool: Pool, tmp_path: Path
) -> None:
    message = mounting.run(open_records_that_cannot_be_written, pool, tmp_path / "store").value
    assert str(tmp_path / "store" / "dagster") in message
