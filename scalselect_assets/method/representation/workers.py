"""Where samples are prepared while the model works: a thread, or processes for a device that outruns it.

Processes are started once and kept for the next shard, since each has to read the tokenizer.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver, get_context, util
from typing import TypeAlias

import torch

from scalselect_assets.method.representation.conversation import Conversation
from scalselect_assets.method.representation.preparation import Prepared, Preparer, for_transport
from scalselect_assets.method.representation.rejection import Rejection

ImageReader: TypeAlias = Callable[[str], bytes]
Submit: TypeAlias = Callable[
    [Sequence[str], Sequence[Conversation], ImageReader], Future[list[Prepared | Rejection]]
]


def start_server() -> None:
    """Begin to start what worker processes are forked from, which imports for seconds; returns at once.

    Called before a model is loaded, it is ready when the model is.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers.models.auto.processing_auto"])
    forkserver.ensure_running()


class Preparation:
    """Prepares groups of samples ahead of their use."""

    def __init__(self, preparer: Preparer) -> None:
        """Nothing is started yet."""
        self._preparer = preparer
        self._processes: ProcessPoolExecutor | None = None
        self._n_processes = 0
        self._end: Callable[[], None] | None = None

    @contextmanager
    def by(self, workers: int) -> Iterator[Submit]:
        """A function that takes what ``Preparer.prepare`` takes and returns a future of its result.

        Args:
            workers: Processes; 0 for a thread of this one, in which Pillow and tokenizers release the lock.

        Raises:
            BrokenProcessPool: A process died, of lack of memory for example; the next call starts new ones.
        """
        if not workers:
            with ThreadPoolExecutor(1, thread_name_prefix="preparation") as thread:
                yield lambda *group: thread.submit(self._preparer.prepare, *group)
            return
        processes = self._processes
        if processes is None or self._n_processes != workers:
            self.close()
            processes = self._start(workers)
        try:
            yield lambda *group: processes.submit(_prepare, *group)
        except BrokenProcessPool:
            self.close()
            raise

    def close(self) -> None:
        """End the processes."""
        if self._end is not None:
            self._end()
        self._processes = self._end = None

    def _start(self, workers: int) -> ProcessPoolExecutor:
        # Forked from a process that has imported everything and runs nothing, never from this one.
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__, *self._preparer.modules])
        processes = ProcessPoolExecutor(workers, context, _take, (self._preparer,))
        # When this object goes, and at exit: a process that is itself a child (a step of a Dagster run)
        # waits for its children then, and these would wait for work.
        self._end = util.Finalize(self, processes.shutdown, kwargs={"cancel_futures": True}, exitpriority=100)
        self._processes, self._n_processes = processes, workers
        return processes


_PREPARERS: list[Preparer] = []  # in a worker process, the one that it works with


def _take(preparer: Preparer) -> None:
    torch.set_num_threads(1)
    _PREPARERS.append(preparer)


def _prepare(
    images: Sequence[str], conversations: Sequence[Conversation], read_image: ImageReader
) -> list[Prepared | Rejection]:
    return for_transport(_PREPARERS[-1].prepare(images, conversations, read_image))
