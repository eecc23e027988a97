"""Progress of the long step, the embedding: lines in the run's log by default, a progress bar in the CLI."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeAlias, TypeVar

T = TypeVar("T")

Log: TypeAlias = logging.Logger | logging.LoggerAdapter[logging.Logger]


class Progress(Protocol):
    """Follows the work of a whole refresh and each embedded row."""

    def planned(self, n_shards: int, n_rows: int) -> None:
        """Take note, before the first shard, of how many shards and rows will be embedded."""

    def track(self, rows: Iterable[T], shard: str, n_rows: int, log: Log) -> Iterator[T]:
        """Pass ``rows`` through, reporting as they go by."""


class LogProgress:
    """Progress as an occasional line in the run's log: rows done, rows per second, time left."""

    def __init__(self, interval_seconds: float = 30.0) -> None:
        self._interval = interval_seconds

    def planned(self, n_shards: int, n_rows: int) -> None:
        """Do nothing: the lines of each shard state its own number of rows."""

    def track(self, rows: Iterable[T], shard: str, n_rows: int, log: Log) -> Iterator[T]:
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
                log.info(f"{shard}: {done}/{n_rows} rows, {rate:.1f}/s, {left:.0f} s left")
        seconds = max(time.monotonic() - start, 1e-9)
        log.info(f"{shard}: {done} rows in {seconds:.1f} s, {done / seconds:.1f}/s")
