"""Notices statements of Dagster's records that an interruption would stop half-way."""

import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

ROOT = Path(__file__).parents[1]
PRODUCT = (ROOT / "scalselect_assets", ROOT / "training")


def _is_interruptible() -> bool:
    """Whether a signal would raise now: as outside of all waits, or where Dagster allows it in an asset."""
    handler = signal.getsignal(signal.SIGINT)
    name = getattr(handler, "__qualname__", "")
    return handler is signal.default_int_handler or name.startswith("raise_interrupts_as.")


@contextmanager
def bypasses(*folders: Path) -> Iterator[list[str]]:
    """The lines of code in ``folders``, by default the product's, whose statements bypass the door.

    A statement of a thread other than the main one counts as no bypass, since it is never interrupted.
    """
    found: list[str] = []

    def before(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread() and _is_interruptible():
            for frame in reversed(traceback.extract_stack()):
                if any(Path(frame.filename).is_relative_to(folder) for folder in folders or PRODUCT):
                    found.append(f"{frame.filename}:{frame.lineno}: {frame.line}")
                    break

    event.listen(Engine, "before_cursor_execute", before)
    try:
        yield found
    finally:
        event.remove(Engine, "before_cursor_execute", before)
