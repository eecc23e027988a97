"""Who may write what of a store, between processes: one writer per shard, one refresh, cleaning alone.

Locks are `flock` locks on files below the store, so the kernel releases them when their holder dies, however
it dies, and readers never wait. A store in an object store is locked on this machine only (its lock files lie
in the temporary folder); several machines that write to one such store need a limit of one in Dagster's run
queue. Costs: two system calls and an empty file per shard.
"""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from scalselect_assets.resources.names import encode_name


class StoreBusyError(RuntimeError):
    """Somebody else holds what is asked for; the message names who and what to do."""


@dataclass(frozen=True)
class StoreLocks:
    """The locks of one store, as files in ``folder``, which is made when first needed."""

    folder: Path

    @contextmanager
    def writing(self, work: str, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Be the only writer of ``work`` (a shard, an asset), beside the writers of other work.

        Waits for whoever writes it now, and for cleaning.

        Args:
            work: Any string.
            on_wait: Told once what is waited for, if anything.
        """
        with (
            self._held("store", fcntl.LOCK_SH, on_wait=on_wait),
            self._held(f"writing-{encode_name(work)}", fcntl.LOCK_EX, on_wait=on_wait),
        ):
            yield

    @contextmanager
    def refreshing(self) -> Iterator[None]:
        """Be the only refresh of the store.

        Raises:
            StoreBusyError: There is another one.
        """
        with self._held("refresh", fcntl.LOCK_EX):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only one at work on the store: no refresh, and no writer of anything.

        Raises:
            StoreBusyError: Somebody is at work.
        """
        with self._held("refresh", fcntl.LOCK_EX), self._held("store", fcntl.LOCK_EX):
            yield

    @contextmanager
    def _held(self, name: str, kind: int, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold one lock; without ``on_wait``, busy is an error."""
        path = self.folder / f"{name}.lock"
        with _writable(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = path.open("ab+", buffering=0)
        with file:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                busy = f"{_holder(file)} is at work on {self.folder.parent} ({path.name})"
                if on_wait is None:
                    raise StoreBusyError(f"{busy}; wait for it to end") from error
                on_wait(f"{busy}; waiting for it to end")
                fcntl.flock(file, kind)
            if kind == fcntl.LOCK_SH:
                yield
                return
            with _writable(path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            try:
                yield
            finally:
                file.truncate(0)  # those who share the lock next leave no name


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Say of errors that concern ``path`` what to do."""
    try:
        yield
    except OSError as error:
        told = f"{error.strerror}; a store is locked by files in it, so it must be writable and have space"
        raise OSError(error.errno, told, str(path)) from error


def _holder(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode() or "another process"
