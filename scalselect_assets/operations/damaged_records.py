"""Handling of a store's Dagster records that are read-only or damaged.

The records are SQLite files. For a store on a read-only file system a copy of them is read, since
SQLite writes beside a file that it reads. Damage is reported with the file and the remedy.
"""

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REMEDY = (
    "move that folder away and run again: results and vectors stay and are taken over, only the history of "
    "runs is lost"
)


class DamagedRecordsError(RuntimeError):
    """Dagster's records cannot be used; the message names the file or the folder, and the remedy."""


def is_fault_of_records(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is an error of a SQLite file."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, sqlite3.DatabaseError):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def named_damage(folder: Path) -> Iterator[None]:
    """Report errors of the SQLite files in a folder with the file that is damaged.

    Raises:
        DamagedRecordsError: A SQLite file is damaged.
    """
    try:
        yield
    except DamagedRecordsError:
        raise
    except Exception as error:
        if not is_fault_of_records(error):
            raise
        damaged = next((file for file in databases(folder) if not is_whole(file)), None)
        if damaged is None:
            raise DamagedRecordsError(
                f"Dagster's records in {folder} cannot be used now ({_first_sqlite_error(error)}); see that "
                "no other process holds them, that they are writable and that the disk has space"
            ) from error
        raise DamagedRecordsError(
            f"Dagster's records in {damaged} cannot be read ({_first_sqlite_error(error)}); {_REMEDY} "
            f"(the folder is {folder})"
        ) from error


def databases(folder: Path) -> list[Path]:
    """The SQLite files of an instance."""
    return sorted(folder.rglob("*.db"))


def is_whole(file: Path) -> bool:
    """Whether SQLite finds no damage in a file; a file that another process has locked counts as whole."""
    try:
        connection = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)
        try:
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        return "locked" in str(error)
    return bool(verdict == "ok")


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@contextmanager
def copied_records(folder: Path) -> Iterator[Path]:
    """A copy of an instance's records for the length of a block, without the logs of single runs."""
    with tempfile.TemporaryDirectory(prefix="scalselect-records-") as temporary:
        copy = Path(temporary) / "dagster"
        if folder.exists():
            shutil.copytree(folder, copy, ignore=_of_single_runs)
        yield copy


def _of_single_runs(folder: str, names: list[str]) -> set[str]:
    if Path(folder).name == "storage":
        return set(names)
    if Path(folder).name == "runs":
        return {name for name in names if not name.startswith("index.db")}
    return {name for name in names if name.startswith(".")}


def _first_sqlite_error(error: BaseException | None) -> str:
    while error is not None and not isinstance(error, sqlite3.DatabaseError):
        error = error.__cause__ or error.__context__
    return str(error)
