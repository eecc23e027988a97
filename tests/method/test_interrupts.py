"""Interruptions that wait: none is raised too early, and none is lost."""

import signal
import sys
import threading
from collections.abc import Iterator

import dagster as dg
import pytest
from dagster._utils.interrupts import capture_interrupts, raise_interrupts_as

from scalselect_assets.method.interrupts import deferred


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True, params=[signal.default_int_handler])
def _nothing_stays_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Set what SIGINT does, which a process inherits: it ignores SIGINT if it was started with `&`."""
    inherited = signal.signal(signal.SIGINT, request.param)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGINT, inherited)


ignored = pytest.mark.parametrize("_nothing_stays_behind", [signal.SIG_IGN], indirect=True)
"""As in a process that a script started with `&`."""


def test_an_interruption_waits_for_the_end_of_the_block() -> None:
    done = []

    def work() -> None:
        with deferred():
            interrupt()
            done.append("in it")
        done.append("after it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["in it"]


def test_without_an_interruption_nothing_is_raised() -> None:
    with deferred():
        pass


def test_a_decorated_function_is_done_before_it_is_interrupted() -> None:
    done = []

    @deferred()
    def record() -> None:
        interrupt()
        done.append("record")

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            record()
    assert done == ["record", "record"]


def test_a_termination_is_raised_as_its_handler_raises_it() -> None:
    class StoppedError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StoppedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(StoppedError), deferred():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@ignored
def test_an_ignored_ctrl_c_stays_ignored() -> None:
    done = []
    with deferred():
        interrupt()
        with capture_interrupts():
            interrupt()
        done.append("in it")
    interrupt()
    assert done == ["in it"]


@ignored
def test_a_termination_ends_what_ignores_ctrl_c() -> None:
    class StoppedError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StoppedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        # Dagster gives SIGTERM the handler of SIGINT, which would ignore it from then on.
        with deferred(), capture_interrupts():
            pass
        with pytest.raises(StoppedError), deferred():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@ignored
def test_dagsters_termination_ends_what_an_asset_computes_where_ctrl_c_is_ignored() -> None:
    with (
        pytest.raises(dg.DagsterExecutionInterruptedError),
        deferred(),
        raise_interrupts_as(dg.DagsterExecutionInterruptedError),
    ):
        interrupt()  # as which Dagster terminates the process of a run


def test_what_allows_interruptions_is_interrupted_at_once_and_only_once() -> None:
    done = []

    @deferred()
    def work() -> None:
        with raise_interrupts_as(dg.DagsterExecutionInterruptedError):
            interrupt()
            done.append("computing")
        done.append("recording")

    with pytest.raises(dg.DagsterExecutionInterruptedError) as raised:
        work()
    assert done == []
    assert raised.value.__context__ is None


def test_one_that_dagster_forgets_at_the_end_of_a_run_is_raised() -> None:
    done = []

    @deferred()
    def work() -> None:
        with capture_interrupts():
            interrupt()
        done.append("the rest")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["the rest"]


def test_one_that_is_swallowed_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    class Freed:
        def __del__(self) -> None:
            interrupt()

    swallowed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda seen: swallowed.append(seen.exc_type))
    with (
        pytest.raises(KeyboardInterrupt),
        deferred(),
        raise_interrupts_as(dg.DagsterExecutionInterruptedError),
    ):
        Freed()
    assert swallowed == [dg.DagsterExecutionInterruptedError]


def test_one_that_comes_with_an_error_is_raised_and_tells_of_it() -> None:
    @deferred()
    def work() -> None:
        interrupt()
        raise OSError("the disk is full")

    with pytest.raises(KeyboardInterrupt) as raised:
        work()
    assert str(raised.value.__context__) == "the disk is full"


def test_an_error_alone_passes() -> None:
    with pytest.raises(OSError, match="the disk is full"), deferred():
        raise OSError("the disk is full")


def test_of_two_blocks_the_outer_one_is_finished_too() -> None:
    done = []

    @deferred()
    def work() -> None:
        with deferred():
            interrupt()
            done.append("inner")
        done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["inner", "outer"]


def test_a_handler_that_is_none_of_pythons_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    getsignal = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda n: None if n == signal.SIGTERM else getsignal(n))
    with pytest.raises(KeyboardInterrupt), deferred():
        interrupt()
    monkeypatch.undo()


def test_another_thread_does_as_without_it() -> None:
    done = []

    def work() -> None:
        with deferred():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.default_int_handler]
