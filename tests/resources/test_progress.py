"""Rows pass through the progress untouched, and the log tells how fast they went."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from scalselect_assets.resources import progress
from scalselect_assets.resources.progress import LogProgress

LOG = logging.getLogger("scalselect.tests.progress")


@pytest.fixture(autouse=True)
def _at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=LOG.name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still unless a test moves its ``now``."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def ticking(clock: SimpleNamespace, n_rows: int, seconds: float) -> Iterator[int]:
    for row in range(n_rows):
        clock.now += seconds
        yield row


def test_rows_pass_through_unchanged_and_in_order(caplog: pytest.LogCaptureFixture) -> None:
    rows = [object() for _ in range(5)]

    passed = list(LogProgress().track(iter(rows), "s.jsonl", len(rows), LOG))

    assert len(passed) == len(rows)
    assert all(got is given for got, given in zip(passed, rows, strict=True))


def test_rows_are_taken_one_at_a_time() -> None:
    taken = []
    rows = (taken.append(row) or row for row in range(5))

    tracked = LogProgress().track(rows, "s.jsonl", 5, LOG)
    next(tracked)

    assert taken == [0]


def test_the_last_line_tells_rows_and_rate(caplog: pytest.LogCaptureFixture, clock: SimpleNamespace) -> None:
    list(LogProgress(interval_seconds=30).track(ticking(clock, 10, 0.5), "한/s.jsonl", 10, LOG))

    assert caplog.messages == ["한/s.jsonl: 10 rows in 5.0 s, 2.0/s"]


def test_without_an_interval_every_row_has_a_line_with_the_total_and_the_time_left(
    caplog: pytest.LogCaptureFixture, clock: SimpleNamespace
) -> None:
    list(LogProgress(interval_seconds=0).track(ticking(clock, 4, 2.0), "s.jsonl", 4, LOG))

    assert caplog.messages == [
        "s.jsonl: 1/4 rows, 0.5/s, 6 s left",
        "s.jsonl: 2/4 rows, 0.5/s, 4 s left",
        "s.jsonl: 3/4 rows, 0.5/s, 2 s left",
        "s.jsonl: 4/4 rows, 0.5/s, 0 s left",
        "s.jsonl: 4 rows in 8.0 s, 0.5/s",
    ]


def test_a_line_is_due_once_per_interval(caplog: pytest.LogCaptureFixture, clock: SimpleNamespace) -> None:
    list(LogProgress(interval_seconds=30).track(ticking(clock, 10, 10.0), "s.jsonl", 10, LOG))

    assert [message.split(" rows")[0] for message in caplog.messages] == [
        "s.jsonl: 3/10",
        "s.jsonl: 6/10",
        "s.jsonl: 9/10",
        "s.jsonl: 10",
    ]


@pytest.mark.parametrize("n_rows", [0, 3])
def test_a_clock_too_coarse_to_move_does_no_harm(
    caplog: pytest.LogCaptureFixture, clock: SimpleNamespace, n_rows: int
) -> None:
    tracked = LogProgress(interval_seconds=0).track(range(n_rows), "s.jsonl", n_rows, LOG)

    assert list(tracked) == list(range(n_rows))
    assert caplog.messages[-1].startswith(f"s.jsonl: {n_rows} rows in 0.0 s")


def test_an_error_of_the_rows_is_not_swallowed_and_no_success_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def failing() -> Iterator[int]:
        yield 0
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        list(LogProgress().track(failing(), "s.jsonl", 2, LOG))

    assert caplog.messages == []
