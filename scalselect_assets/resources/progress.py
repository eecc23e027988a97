"""Where the speed of the long step goes: the run's log by default, a progress bar in the CLI."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from scalselect_assets.method.interrupts import deferred

T = TypeVar("T")


class Progress(Protocol):
    """Told of the work of a whole refresh and of each embedded row."""

    def planned(self, n_shards: int, n_rows: int) -> None:
        """Before the first shard: how many shards and rows will be embedded."""

    def track(self, rows: Iterable[T], shard: str, n_rows: int, log: logging.Logger) -> Iterator[T]:
        """Pass ``rows`` through, reporting as they go by."""


class LogProgress:
    """A line in the run's log now and then: rows done, rows per second, time left."""

    def __init__(self, interval_seconds: float = 30.0) -> None:
        self._interval = interval_seconds

    def planned(self, n_shards: int, n_rows: int) -> None:
        """Nothing to do: each shard's lines speak for themselves."""

    def track(self, rows: Iterable[T], shard: str, n_rows: int, log: logging.Logger) -> Iterator[T]:
        """Pass ``rows`` through, logging every interval and at the end."""
        start = reported = time.monotonic()
        done = 0
        for row in rows:
            yield row
            done += 1
            now = time.monotonic()
            if now - reported >= self._interval:
                reported, rate = now, done / max(now - start, 1e-9)
                left = (n_rows - done) / rate
                with deferred():
                    log.info(f"{shard}: {done}/{n_rows} rows, {rate:.1f}/s, {left:.0f} s left")
        seconds = max(time.monotonic() - start, 1e-9)
        with deferred():
            log.info(f"{shard}: {done} rows in {seconds:.1f} s, {done / seconds:.1f}/s")
