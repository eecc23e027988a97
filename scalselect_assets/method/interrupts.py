"""Interruptions that wait for work that must not stop half-way.

Ctrl-C, SIGTERM and a termination in Dagster's UI raise an exception in the main thread, between any two
instructions of it. In the middle of a transaction of Dagster's SQLite files, the exception leaves a
connection with the file locked for as long as its traceback lives, and the refresh then waits minutes for
that lock to record that it was stopped. Between taking a future's lock and using it, the exception leaves the
lock taken: the thread that sets the result waits for ever, and so does every thread that waits for it.
Therefore the code that reads or writes Dagster's records (`recording.records`), and the code that waits for
threads, defers interruptions. A signal that the process ignores stays ignored, for example SIGINT if a
script started the process with ``&``. SIGTERM still works then.
"""

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def deferred() -> Iterator[None]:
    """Defer an interruption until the end of the block.

    Code in the block may allow interruptions again, as Dagster does while an asset computes. An interruption
    that is swallowed there, or that Dagster forgets at the end of a run, takes effect as the block ends. Only
    the main thread is ever interrupted; in other threads, this does nothing.

    Raises:
        BaseException: The exception that the signal's own handler raises, if a signal came and the block is
            not already being left because of one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: set[int] = set()
    stopped = False
    noted, note = socket.socketpair()
    with noted, note:
        noted.setblocking(False)
        note.setblocking(False)
        try:
            # Order matters: a signal may arrive between any two lines, and its handler must be able to run.
            with ExitStack() as handlers:
                for number in _SIGNALS:
                    if (handler := signal.getsignal(number)) is not None:  # None: not set by Python
                        handlers.callback(signal.signal, number, handler)
                        signal.signal(number, lambda number, _: came.add(number))
                # The interpreter writes the number of every signal here, whichever handler it has.
                handlers.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(-1))
                signal.set_wakeup_fd(note.fileno(), warn_on_full_buffer=False)
                try:
                    yield
                except Exception:
                    raise
                except BaseException:  # KeyboardInterrupt or Dagster's interruption, which are no errors
                    stopped = True
                    raise
        finally:
            with suppress(BlockingIOError):
                came.update(noted.recv(4096))
            for number in _SIGNALS if not stopped else ():
                if number in came:
                    signal.raise_signal(number)
