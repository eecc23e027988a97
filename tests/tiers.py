"""The two tiers of tests: `make test-quick` runs every test that is not slow, `make test` runs all.

A test is slow if it takes one of the fixtures below, itself or through another fixture; they stand for
Dagster runs, models and processes. Nobody marks a test by hand, so a new test falls into its tier by what it
uses.
`refuse_processes` stops a test that starts a process of Python behind their back.
"""

import multiprocessing.process
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

SLOW: Final = "slow"
SLOW_FIXTURES: Final = frozenset({"quick_dagster", "demo_vlm", "tiny_vlm", "processes", "children"})


def mark_slow(items: list[pytest.Item]) -> None:
    """Give every slow test the marker ``slow``."""
    for item in items:
        if not SLOW_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(SLOW)


def refuse_processes(patch: pytest.MonkeyPatch) -> None:
    """Let a test fail that starts a process of Python, until the patch is undone."""
    popen, start = subprocess.Popen.__init__, multiprocessing.process.BaseProcess.start

    def checked_popen(self: Any, args: Any, *more: Any, **options: Any) -> None:
        program = args if isinstance(args, str | Path) else next(iter(args))
        if Path(program).parent == Path(sys.executable).parent:
            _refuse()
        popen(self, args, *more, **options)

    def checked_start(self: Any) -> None:
        _refuse()
        start(self)

    patch.setattr(subprocess.Popen, "__init__", checked_popen)
    patch.setattr(multiprocessing.process.BaseProcess, "start", checked_start)


def _refuse() -> None:
    pytest.fail("this test starts a process; let it take the fixture `processes`, or `fresh_python`")
