"""Processes that can be killed, without the seconds that importing torch, Dagster and LanceDB takes.

A server process imports them once, runs nothing that starts a thread, and forks a child for each call.
"""

import ctypes
import gc
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE = 1800.0  # seconds, which only what hangs takes
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS", "TOKIO_WORKER_THREADS"), "1"
)

# Of Linux; Python has names for them from 3.12 on.
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000


class ChildError(AssertionError):
    """A child raised, or did not end in time; the message holds what it wrote."""


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        pid: Its process id.
        status: 0, or minus the signal that killed it.
        cpu_seconds: Processor time that it took.
        value: What its function returned; none where it was killed.
    """

    pid: int
    status: int
    cpu_seconds: float
    value: Any

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


class Children:
    """Runs functions of importable modules in children of the server; ``close`` ends it.

    Attributes:
        cpu_seconds: Processor time of the children that have ended.
        may_mount: Whether children may mount file systems, which only they see.
    """

    def __init__(self, folder: Path) -> None:
        """Start the server.

        Args:
            folder: For what children write to their standard output, and for what they return.
        """
        self._folder = folder
        self.cpu_seconds = 0.0
        self._server = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", __name__],
            cwd=ROOT,
            env={**os.environ, **_ONE_THREAD, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._server.stdout is not None
        self.may_mount = bool(pickle.load(self._server.stdout))

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=PATIENCE)

    def start(self, function: Callable[..., Any], *arguments: Any) -> int:
        """Start a child that calls ``function``; returns its process id.

        Raises:
            ChildError: The server is gone.
        """
        return int(self._ask("start", function, arguments, self._folder))

    def wait(self, pid: int, timeout: float = PATIENCE) -> Ended:
        """Wait for a child.

        Raises:
            ChildError: It raised, or was still running at the end of the time and was killed.
        """
        status, cpu_seconds = self._ask("wait", pid, time.monotonic() + timeout)
        self.cpu_seconds += cpu_seconds
        said = (self._folder / f"{pid}.log").read_text(errors="replace")
        if status is None:
            raise ChildError(f"child {pid} did not end within {timeout:g} s:\n{said}")
        if status == -signal.SIGKILL:
            return Ended(pid, status, cpu_seconds, None)
        if status != 0:
            raise ChildError(f"child {pid} ended with status {status}:\n{said}")
        return Ended(pid, status, cpu_seconds, pickle.loads((self._folder / f"{pid}.pickle").read_bytes()))

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = PATIENCE) -> Ended:
        """Start a child and wait for it; raises as ``wait``."""
        return self.wait(self.start(function, *arguments), timeout)

    def _ask(self, *request: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        try:
            pickle.dump(request, self._server.stdin)
            self._server.stdin.flush()
            return pickle.load(self._server.stdout)
        except (BrokenPipeError, EOFError) as error:
            raise ChildError(f"the server ended with status {self._server.wait(timeout=PATIENCE)}") from error


def _prepare() -> None:
    """Import what a refresh needs, and leave out of it what costs time and has no part in any fault."""
    import lancedb.background_loop
    import scipy.integrate  # noqa: F401

    from scalselect_assets import graph  # noqa: F401
    from scalselect_assets.charts import in_dagster  # noqa: F401
    from tests import all_methods  # noqa: F401
    from tests.faults import (
        known_pool,  # noqa: F401
        standin,
    )

    standin.install()
    # The only thread so far; LanceDB starts another in each child, after the fork.
    loop = lancedb.background_loop.LOOP
    loop.loop.call_soon_threadsafe(loop.loop.stop)
    loop.thread.join()
    warnings.filterwarnings("ignore", "lancedb fork support", RuntimeWarning)
    gc.freeze()


def _own_mounts() -> bool:
    """Leave the machine's mount points alone from now on; whether the system allows that."""
    user, group, is_root = os.getuid(), os.getgid(), os.geteuid() == 0
    libc = ctypes.CDLL(None)
    if libc.unshare(_CLONE_NEWNS if is_root else _CLONE_NEWNS | _CLONE_NEWUSER) != 0:
        return False
    if not is_root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return bool(libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None) == 0)


def _serve() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    pickle.dump(_own_mounts(), answers)  # which a process with threads may not
    _prepare()
    from tests.quick_dagster import quick_storage

    with TemporaryDirectory() as templates, quick_storage(Path(templates)):
        answers.flush()
        while True:
            try:
                kind, *request = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            pickle.dump({"start": _fork, "wait": _wait}[kind](*request), answers)
            answers.flush()


def _fork(function: Callable[..., Any], arguments: tuple[Any, ...], folder: Path) -> int:
    if pid := os.fork():
        return pid
    status = 1
    gc.disable()  # a child does not live long enough for it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the whole suite's process may ignore
    try:
        log = os.open(folder / f"{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        (folder / f"{os.getpid()}.pickle").write_bytes(pickle.dumps(function(*arguments)))
        status = 0
    except BaseException:  # noqa: BLE001 - the parent is told, and nothing may return into the server's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pid: int, deadline: float) -> tuple[int | None, float]:
    timed_out = False
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            code = None if timed_out else os.waitstatus_to_exitcode(status)
            return code, usage.ru_utime + usage.ru_stime
        if time.monotonic() > deadline and not timed_out:
            timed_out = True
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


if __name__ == "__main__":
    _serve()
