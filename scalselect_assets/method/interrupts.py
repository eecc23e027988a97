"""Interruptions that wait for what must not stop half-way.

Ctrl-C, SIGTERM and a termination in Dagster's UI raise an exception in the main thread, between any two
instructions of it. In the middle of a transaction of Dagster's SQLite files that leaves a connection with the
file locked, for as long as the exception's traceback lives, and the run that is to be recorded as stopped
waits for the lock minutes long. Between taking a future's lock and using it, the lock stays taken, and the
thread that is to set the result waits for ever, as does who waits for the thread. So whatever asks or tells a
Dagster instance, and whatever waits for threads, does it here.
"""

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def deferred() -> Iterator[None]:
    """Let an interruption wait for the end of the block, which it then leaves as it would have before.

    Code in the block may allow interruptions again, as Dagster does for what an asset computes. One that is
    swallowed there, or that Dagster forgets as it does at the end of a run, is raised as the block ends.
    Other threads than the main one are never interrupted; there, it does nothing.

    Raises:
        BaseException: What the handler of the signal raises, if one came and the block is not being left for
            one already.
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
            # Whatever comes between two of these lines finds all in place that it needs.
            with ExitStack() as handlers:
                for number in _SIGNALS:
                    if (handler := signal.getsignal(number)) is not None:  # else it is none of Python's
                        handlers.callback(signal.signal, number, handler)
                        signal.signal(number, lambda number, _: came.add(number))
                # The interpreter writes the number of every signal, whoever handles it.
                handlers.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(-1))
                signal.set_wakeup_fd(note.fileno(), warn_on_full_buffer=False)
                try:
                    yield
                except Exception:
                    raise
                except BaseException:  # as KeyboardInterrupt and Dagster's own are, but no error is
                    stopped = True
                    raise
        finally:
            with suppress(BlockingIOError):
                came.update(noted.recv(4096))
            for number in _SIGNALS if not stopped else ():
                if number in came:
                    signal.raise_signal(number)
