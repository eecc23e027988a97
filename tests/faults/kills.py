"""Ends a process at a chosen point of a refresh, and tells which points there are.

A point is an audit event of Python (a file is opened, renamed or removed, a lock is taken, a database is
opened), a statement or commit of Dagster's SQLite, or the start of a table's commit. LanceDB writes in
threads of its own without events, so a kill may also come some milliseconds after a point.
"""

import os
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from sqlalchemy import Engine, event

from scalselect_assets import ASSET_MODULES
from scalselect_assets.embedding import reuse
from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.resources.embedding_store import EmbeddingStore
from tests.faults import standin
from tests.faults.known_pool import FaultBench

TABLE = "commit of a table"
DAGSTER = "Dagster's records"
DISCOVERY = "discovery"
BETWEEN = "between assets"
KEPT = "(set aside)"
RECEIPT = "receipt of a table"
EMBEDDING = "attention_embeddings"
ABSENT = {"removed_samples", "selection_report"}  # which the pool's selection does not declare
_FIRST, _LATER = list(ASSET_MODULES)[:2], [asset for asset in list(ASSET_MODULES)[2:] if asset not in ABSENT]
STAGES = (DISCOVERY, *_FIRST, TABLE, RECEIPT, *_LATER, DAGSTER, BETWEEN)
"""In the order in which a refresh comes past them; Dagster's records are everywhere."""

_EVENTS = {"open", "sqlite3.connect", "fcntl.flock"}
_EVENT_PREFIXES = ("os.", "shutil.")
_NO_EVENTS = {"os.listdir", "os.scandir", "os.putenv", "os.unsetenv", "os.walk", "os.fwalk"}
_stage_of_code: dict[CodeType, str | None] = {}


@dataclass(frozen=True)
class Kill:
    """Where to end: ``delay`` seconds after the ``n``-th event (from 1) of ``stage``."""

    stage: str
    n: int
    delay: float = 0.0


class Watch:
    """Counts a process's events by stage and ends it at one of them."""

    def __init__(self, kill: Kill | None, record: Path) -> None:
        """Prepare.

        Args:
            kill: Where to end the process, if anywhere.
            record: Gets the stage in which the process was when it ended.
        """
        self.counts: Counter[str] = Counter()
        self._kill = kill
        self._record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._main = threading.get_ident()
        self._armed = self._noting = self._is_committed = False

    def start(self) -> None:
        """Watch from now on, until the process ends: audit hooks cannot be removed."""

        def hook(name: str, _: Any) -> None:
            if name in _EVENTS or (name.startswith(_EVENT_PREFIXES) and name not in _NO_EVENTS):
                self.note()

        sys.addaudithook(hook)
        event.listen(Engine, "before_cursor_execute", lambda *_: self.note())
        event.listen(Engine, "commit", lambda *_: self.note())
        replace = EmbeddingStore.replace

        def noted(*arguments: Any, **options: Any) -> Any:
            self.note(TABLE)
            table = replace(*arguments, **options)
            self._is_committed = True
            return table

        EmbeddingStore.replace = noted  # type: ignore[method-assign]

    def note(self, stage: str | None = None) -> None:
        """Count an event of the main thread."""
        if self._noting or threading.get_ident() != self._main:
            return
        self._noting = True
        stage = stage or stage_of(sys._getframe(1))
        if stage in ASSET_MODULES and stage != EMBEDDING:
            self._is_committed = False
        elif stage == EMBEDDING and self._is_committed:
            stage = RECEIPT
        self.counts[stage] += 1
        kill = self._kill
        if kill is not None and not self._armed and (stage, self.counts[stage]) == (kill.stage, kill.n):
            self._armed = True
            if kill.delay:
                threading.Thread(target=self._end_later, args=(kill.delay,), daemon=True).start()
            else:
                self._end(stage)
        self._noting = False

    def _end_later(self, delay: float) -> None:
        time.sleep(delay)
        self._end(stage_of(sys._current_frames()[self._main]))

    def _end(self, stage: str) -> None:
        os.write(self._record, stage.encode())
        os.kill(os.getpid(), signal.SIGKILL)


def stage_of(frame: FrameType | None) -> str:
    """What a thread is doing, by the functions that it is in, innermost first."""
    while frame is not None:
        code = frame.f_code
        if code not in _stage_of_code:
            _stage_of_code[code] = _stage(Path(code.co_filename), code.co_name)
        if (stage := _stage_of_code[code]) is not None:
            return stage
        frame = frame.f_back
    return BETWEEN


def _stage(file: Path, function: str) -> str | None:
    if "/dagster/_core/storage/" in file.as_posix():
        return DAGSTER
    if (file.stem, function) == ("embedding_store", "replace"):
        return TABLE
    if file.stem == function and function in ASSET_MODULES:  # the asset's body
        return function
    return DISCOVERY if (file.stem, function) == ("discovery", "discover") else None


def refresh(pool: Path, store: Path, ledger: Path, kill: Kill | None, record: Path) -> Counter[str]:
    """One refresh that ends as ``kill`` says; else its events by stage.

    The ledger gets a line with `KEPT` whenever what was embedded before it has been set aside.
    """
    standin.StandIn.ledger = ledger
    write_frame = ArtifactStore.write_frame

    def told(self: ArtifactStore, asset: str, *arguments: Any) -> Any:
        written = write_frame(self, asset, *arguments)
        if asset == reuse.SET_ASIDE:
            with ledger.open("a") as file:
                file.write(f"{os.getpid()} {KEPT}\n")
        return written

    ArtifactStore.write_frame = told  # type: ignore[method-assign]
    watch = Watch(kill, record)
    watch.start()
    report = FaultBench(pool, store).refresh()
    assert report.problems() == []
    return watch.counts
