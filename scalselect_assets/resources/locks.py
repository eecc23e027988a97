"""Locks between the processes that write to a store: one writer per shard, one refresh, cleaning alone.

Locks are `flock` locks on files below the store, so the kernel releases them when their holder dies, however
it dies, and readers never wait. A store in an object store is locked for this user on this machine only (its
lock files lie in a private folder below the temporary one); several machines or users that write to one such
store need a limit of one in Dagster's run queue. No link is followed on the way to a lock's file, so nobody
who may write to the temporary folder can have another file emptied. Costs: a few system calls and an empty
file per shard.
"""

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from scalselect_assets.resources.names import encode_name


class StoreBusyError(RuntimeError):
    """Another process holds the lock; the message names the process and says what to do."""


@dataclass(frozen=True)
class StoreLocks:
    """The locks of one store, as files in a folder, which is made when first needed.

    Attributes:
        folder: The folder of the lock files.
        private: Whether the folder must be this user's own, closed to all others.
    """

    folder: Path
    private: bool = False

    @contextmanager
    def writing(self, work: str, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Be the only writer of ``work`` (a shard, an asset), beside the writers of other work.

        Waits for the current writer of the same work, and for cleaning.

        Args:
            work: Any string.
            on_wait: Called before a wait, with a description of the lock's holder.
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
            StoreBusyError: Another refresh is running.
        """
        with self._held("refresh", fcntl.LOCK_EX):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only one at work on the store: no refresh, and no writer of anything.

        Raises:
            StoreBusyError: Another process is at work on the store.
        """
        with self._held("refresh", fcntl.LOCK_EX), self._held("store", fcntl.LOCK_EX):
            yield

    @contextmanager
    def _held(self, name: str, kind: int, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold one lock. Without ``on_wait``, a busy lock is an error."""
        path = self.folder / f"{name}.lock"
        with _writable(path):
            descriptor = self._open(path.name)
        with os.fdopen(descriptor, "rb+", buffering=0) as file:
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
                file.truncate(0)  # later holders of a shared lock write no name

    def _open(self, name: str) -> int:
        """Open a lock's file, or make it; nothing is written to it before it is known to be a lock's file.

        Raises:
            OSError: The folder or the file is a link, belongs to another user, or cannot be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700 if self.private else 0o777)
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            held = os.fstat(folder)
            if self.private and (held.st_uid != os.geteuid() or held.st_mode & 0o077):
                raise OSError(errno.EPERM, "the folder of the locks is not this user's own", str(self.folder))
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, 0o666, dir_fd=folder)
        finally:
            os.close(folder)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            os.close(descriptor)
            raise OSError(errno.EPERM, "the lock's file is another file's second name, or no file", name)
        return descriptor


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Add advice to errors that concern ``path``."""
    try:
        yield
    except OSError as error:
        remedy = (
            "remove it: it is none that this package made, and what it leads to is left alone"
            if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EPERM)
            else "a store is locked by files in it, so it must be writable and have space"
        )
        raise OSError(error.errno, f"{error.strerror}; {remedy}", str(path)) from error


def _holder(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(200).decode(errors="replace") or "another process"
