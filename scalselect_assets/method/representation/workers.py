"""Preparation of samples while the model works: in a thread, or in processes if the device outruns a thread.

Processes are started once and kept for the next shard, because each of them has to load the tokenizer.
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
    """Begin to start the server that worker processes are forked from, and return at once.

    The server takes seconds to import its modules. If it is started before a model is loaded, both are ready
    at about the same time.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers.models.auto.processing_auto"])
    forkserver.ensure_running()


class Preparation:
    """Prepares groups of samples ahead of their use."""

    def __init__(self, preparer: Preparer) -> None:
        """Keep the preparer; no process is started yet."""
        self._preparer = preparer
        self._processes: ProcessPoolExecutor | None = None
        self._n_processes = 0
        self._end: Callable[[], None] | None = None

    @contextmanager
    def by(self, workers: int) -> Iterator[Submit]:
        """A function that takes the arguments of ``Preparer.prepare`` and returns a future of its result.

        Args:
            workers: Number of processes; 0 for a thread here (Pillow and tokenizers release the GIL).

        Raises:
            BrokenProcessPool: A process died, for example for lack of memory; the next call starts new ones.
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
        """Stop the worker processes."""
        if self._end is not None:
            self._end()
        self._processes = self._end = None

    def _start(self, workers: int) -> ProcessPoolExecutor:
        # Workers are forked from an idle process that has imported everything, never from this process.
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__, *self._preparer.modules])
        processes = ProcessPoolExecutor(workers, context, _take, (self._preparer,))
        # Runs when this object is deleted, and at exit. A process that is a child itself (a Dagster step)
        # then waits for its own children, which would wait for work for ever.
        self._end = util.Finalize(self, processes.shutdown, kwargs={"cancel_futures": True}, exitpriority=100)
        self._processes, self._n_processes = processes, workers
        return processes


_PREPARERS: list[Preparer] = []  # in a worker process: its one preparer


def _take(preparer: Preparer) -> None:
    torch.set_num_threads(1)
    _PREPARERS.append(preparer)


def _prepare(
    images: Sequence[str], conversations: Sequence[Conversation], read_image: ImageReader
) -> list[Prepared | Rejection]:
    return for_transport(_PREPARERS[-1].prepare(images, conversations, read_image))
