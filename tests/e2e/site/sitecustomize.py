"""What Python imports first in each process of the tests' `dagster dev`.

Dagster's code server spawns a process for each run, which imports for 8 processor seconds what a test's run
uses for one. Here the process is forked from one that has imported it; all else is as Dagster has it.
"""

import multiprocessing
import sys
from multiprocessing.context import BaseContext
from typing import Any

if {"api", "grpc"} <= set(sys.orig_argv):
    _get_context = multiprocessing.get_context

    def _forking(method: str | None = None) -> BaseContext:
        if method != "spawn":
            return _get_context(method)
        context: Any = _get_context("forkserver")
        context.set_forkserver_preload(["tests.e2e.imports_of_a_run"])
        return context

    multiprocessing.get_context = _forking  # type: ignore[assignment]
