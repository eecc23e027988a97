"""The two tiers of tests: `make test-quick` runs every test that is not slow, `make test` runs all.

A test is slow if it takes one of the fixtures below, itself or through another fixture; they stand for
Dagster runs, models and processes. Nobody marks a test by hand, so a new test falls into its tier by what it
uses, and one that starts Python behind their back fails.
"""

import multiprocessing.process
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

SLOW: Final = "slow"
SLOW_FIXTURES: Final = frozenset({"quick_dagster", "demo_vlm", "tiny_vlm", "processes", "children"})
_running: list[pytest.Item] = []


def mark_slow(items: list[pytest.Item]) -> None:
    """Give every slow test the marker ``slow``."""
    for item in items:
        if not SLOW_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(SLOW)


@contextmanager
def running(item: pytest.Item) -> Iterator[None]:
    """Hold a test, with its fixtures, to its tier within the block."""
    _running.append(item)
    try:
        yield
    finally:
        _running.pop()


def hold_to_tiers(patch: pytest.MonkeyPatch) -> None:
    """Let a test that is not slow fail when it starts a process of Python."""
    popen, start = subprocess.Popen.__init__, multiprocessing.process.BaseProcess.start

    def checked_popen(self: Any, args: Any, *more: Any, **options: Any) -> None:
        program = args if isinstance(args, str | bytes | os.PathLike) else next(iter(args))
        if Path(os.fsdecode(program)).parent == Path(sys.executable).parent:
            _refuse_if_quick()
        popen(self, args, *more, **options)

    def checked_start(self: Any) -> None:
        _refuse_if_quick()
        start(self)

    patch.setattr(subprocess.Popen, "__init__", checked_popen)
    patch.setattr(multiprocessing.process.BaseProcess, "start", checked_start)


def _refuse_if_quick() -> None:
    if _running and _running[-1].get_closest_marker(SLOW) is None:
        pytest.fail("a test that starts a process takes the fixture `processes`, or `fresh_python`")
