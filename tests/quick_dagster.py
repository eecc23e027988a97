"""Dagster's SQLite storage, spared the work that every test would repeat.

The files are the product's and hold the same. But their schemas are made once and copied, engines and their
connections are kept (a statement is compiled once for each), Alembic's scripts are read once, and what a run
prints is not copied to a file by four more processes. Tests of whole processes (`tests.e2e`, the command
line) go without all this.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from alembic.script import ScriptDirectory
from dagster._core.storage.compute_log_manager import CapturedLogContext
from dagster._core.storage.event_log.sqlite import consolidated_sqlite_event_log, sqlite_event_log
from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager
from dagster._core.storage.runs.sqlite import sqlite_run_storage
from dagster._core.storage.schedules.sqlite import sqlite_schedule_storage
from sqlalchemy import Engine, QueuePool, make_url

_MODULES = (consolidated_sqlite_event_log, sqlite_event_log, sqlite_run_storage, sqlite_schedule_storage)
_keeping = True


@contextmanager
def quick_storage(templates: Path) -> Iterator[None]:
    """What is above, within the block.

    Args:
        templates: A folder for files to copy from, which several such blocks may share.
    """
    with pytest.MonkeyPatch.context() as patch:
        engines: dict[tuple[str, int], Engine] = {}
        for module in _MODULES:
            patch.setattr(module, "create_engine", _kept_engines(module.create_engine, engines))
        patch.setattr(ScriptDirectory, "from_config", _kept_scripts(ScriptDirectory.from_config))
        storage = sqlite_event_log.SqliteEventLogStorage
        patch.setattr(storage, "_initdb", _copied_event_files(storage._initdb, templates / "run.db"))
        patch.setattr(
            dg.DagsterInstance,
            "from_config",
            staticmethod(_copied_instances(dg.DagsterInstance.from_config, templates / "instance")),
        )
        patch.setattr(LocalComputeLogManager, "capture_logs", _no_capture)
        try:
            yield
        finally:
            for engine in engines.values():
                Engine.dispose(engine)


@contextmanager
def closed_connections() -> Iterator[None]:
    """Let files be closed, and be made small, as often as the product does it."""
    global _keeping  # noqa: PLW0603 - as global as what is patched
    _keeping = False
    try:
        yield
    finally:
        _keeping = True


def _kept_engines(
    create_engine: Callable[..., Engine], engines: dict[tuple[str, int], Engine]
) -> Callable[..., Engine]:
    def kept(location: str, **options: Any) -> Engine:
        file = Path(str(make_url(location).database))
        if not (file.exists() and _keeping):
            return create_engine(location, **options)
        # A file that is put in another's place is another one.
        known = location, file.stat().st_ino
        if known not in engines:
            engines[known] = create_engine(location, **options | {"poolclass": QueuePool})
            engines[known].dispose = lambda close=True: None  # type: ignore[method-assign]  # noqa: ARG005
        return engines[known]

    return kept


def _kept_scripts(from_config: Callable[[Any], ScriptDirectory]) -> Callable[[Any], ScriptDirectory]:
    kept: dict[str | None, ScriptDirectory] = {}

    def of(config: Any) -> ScriptDirectory:
        location = config.get_main_option("script_location")
        if location not in kept:
            kept[location] = from_config(config)
        return kept[location]

    return of


def _copied_event_files(initdb: Callable[..., None], template: Path) -> Callable[..., None]:
    def copied(self: Any, engine: Engine, for_index_shard: bool = False) -> None:
        file = Path(str(engine.url.database))
        if for_index_shard or file.exists():
            initdb(self, engine, for_index_shard)
        elif template.exists():
            _copy_file(template, file)
        else:
            initdb(self, engine)
            _copy_file(file, template)

    return copied


def _copy_file(source: Path, target: Path) -> None:
    """At once, so that nobody finds half of it, whoever is killed."""
    part = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copyfile(source, part)
    part.replace(target)


def _copied_instances(
    from_config: Callable[..., dg.DagsterInstance], template: Path
) -> Callable[..., dg.DagsterInstance]:
    def copied(config_dir: str, *arguments: str) -> dg.DagsterInstance:
        parts = ("history", "schedules")
        is_new = not any((Path(config_dir) / part).exists() for part in parts)
        if is_new and template.exists():
            shutil.copytree(template, config_dir, dirs_exist_ok=True)
        instance = from_config(config_dir, *arguments)
        if is_new and not template.exists():
            making = template.with_name(f"{template.name}.{os.getpid()}")
            for part in parts:
                shutil.copytree(Path(config_dir) / part, making / part)
            making.rename(template)
        return instance

    return copied


@contextmanager
def _no_capture(_: LocalComputeLogManager, log_key: Sequence[str]) -> Iterator[CapturedLogContext]:
    yield CapturedLogContext(log_key)
