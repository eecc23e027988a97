"""Processes that prepare samples are started once, outlive a failure, and end when they are told to."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool

import pytest

from scalselect_assets.method.representation.preparation import Prepared, Preparer
from scalselect_assets.method.representation.workers import Preparation, start_server
from tests.method.samples import question, read_image, read_image_or_fail

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CONVERSATIONS = [question("Why?").conversation]


@pytest.fixture(scope="module")
def preparation(tiny_preparer: Callable[..., Preparer]) -> Iterator[Preparation]:
    preparation = Preparation(tiny_preparer("llava"))
    yield preparation
    preparation.close()


def processes() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid is not None}


def read_and_die(_reference: str) -> bytes:
    os._exit(1)  # as where the kernel ends it for lack of memory


def prepare(preparation: Preparation, workers: int, read: Callable[[str], bytes] = read_image) -> object:
    with preparation.by(workers) as submit:
        (outcome,) = submit(["1"], CONVERSATIONS, read).result()
        return outcome


def test_a_thread_starts_no_process(preparation: Preparation) -> None:
    before = processes()
    assert isinstance(prepare(preparation, 0), Prepared)
    assert processes() == before


def test_processes_stay_for_the_next_shard_until_they_are_closed(preparation: Preparation) -> None:
    assert isinstance(prepare(preparation, 1), Prepared)
    started = processes()
    assert isinstance(prepare(preparation, 1), Prepared)
    assert processes() == started
    with pytest.raises(OSError, match="Input/output error"), preparation.by(1) as submit:
        submit(["damaged disk"], CONVERSATIONS, read_image_or_fail).result()
    assert isinstance(prepare(preparation, 1), Prepared)
    assert processes() == started
    preparation.close()
    assert not processes() & started


def test_after_the_death_of_a_process_the_next_call_starts_new_ones(preparation: Preparation) -> None:
    with pytest.raises(BrokenProcessPool):
        prepare(preparation, 1, read_and_die)
    assert isinstance(prepare(preparation, 1), Prepared)


def test_a_server_that_was_started_before_serves_as_well(tiny_preparer: Callable[..., Preparer]) -> None:
    start_server()
    preparation = Preparation(tiny_preparer("llava"))
    try:
        assert isinstance(prepare(preparation, 1), Prepared)
    finally:
        preparation.close()
