"""Dagster without the work that every refresh of a test would repeat: the one place that patches Dagster.

Why: a run in process takes 0.3 s of processor time, and a test starts dozens. Half of it goes into what is
the same each time: the schemas of SQLite files, Alembic's scripts, statements that SQLAlchemy compiles anew
for each engine, the snapshot of the same job, a picture that no test looks at, and four processes that copy
to a file what a run prints. Dagster offers no setting for that, so `quick_storage` patches Dagster, private
modules included. The files stay the product's and hold the same. Tests of whole processes (`tests.e2e`, the
installed command) go without all this.

A later Dagster may have moved what a shortcut patches. Such a shortcut is left out with a warning, and the
tests run as before, only slower.
"""

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import dagster as dg
import pytest
from sqlalchemy import Engine, QueuePool, make_url

_SQLITE = "dagster._core.storage"
_STORAGES = (
    f"{_SQLITE}.event_log.sqlite.consolidated_sqlite_event_log",
    f"{_SQLITE}.event_log.sqlite.sqlite_event_log",
    f"{_SQLITE}.runs.sqlite.sqlite_run_storage",
    f"{_SQLITE}.schedules.sqlite.sqlite_schedule_storage",
)
_JOBS_KEPT = 64
_keeping = True

Shortcut: TypeAlias = Callable[[pytest.MonkeyPatch], None]


@contextmanager
def quick_storage(templates: Path) -> Iterator[None]:
    """Take all shortcuts within the block.

    Args:
        templates: A folder for files to copy from, which several such blocks may share.
    """
    engines: dict[tuple[str, int], Engine] = {}
    shortcuts: dict[str, Shortcut] = {
        **{f"kept connections of {module}": _keep_engines(module, engines) for module in _STORAGES},
        "kept scripts of Alembic": _keep_scripts,
        "copied files of events": _copy_event_files(templates / "run.db"),
        "copied files of an instance": _copy_instances(templates / "instance"),
        "kept jobs": _keep_jobs,
        "no copies of what runs print": _capture_nothing,
        "no picture of the energy": _draw_nothing,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, shortcut in shortcuts.items():
            try:
                shortcut(patch)
            except (ImportError, AttributeError) as error:
                warnings.warn(f"tests run slower, without this shortcut ({name}): {error}", stacklevel=2)
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


def _keep_engines(module: str, engines: dict[tuple[str, int], Engine]) -> Shortcut:
    """One engine for each file, whose connections and compiled statements last until the block ends."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        create_engine = import_module(module).create_engine

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

        patch.setattr(sys.modules[module], "create_engine", kept)

    return apply


def _keep_scripts(patch: pytest.MonkeyPatch) -> None:
    """Alembic's migrations, read once for each storage."""
    from alembic.script import ScriptDirectory

    from_config, scripts = ScriptDirectory.from_config, dict[str | None, ScriptDirectory]()

    def kept(config: Any) -> ScriptDirectory:
        location = config.get_main_option("script_location")
        if location not in scripts:
            scripts[location] = from_config(config)
        return scripts[location]

    patch.setattr(ScriptDirectory, "from_config", kept)


def _copy_event_files(template: Path) -> Shortcut:
    """A run's event log, copied from the first one."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        storage = import_module(f"{_SQLITE}.event_log.sqlite.sqlite_event_log").SqliteEventLogStorage
        initdb = storage._initdb

        def copied(self: Any, engine: Engine, for_index_shard: bool = False) -> None:
            file = Path(str(engine.url.database))
            if for_index_shard or file.exists():
                initdb(self, engine, for_index_shard)
            elif template.exists():
                _copy_file(template, file)
            else:
                initdb(self, engine)
                _copy_file(file, template)

        patch.setattr(storage, "_initdb", copied)

    return apply


def _copy_file(source: Path, target: Path) -> None:
    """At once, so that nobody finds half of it, whoever is killed."""
    part = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copyfile(source, part)
    part.replace(target)


def _copy_instances(template: Path) -> Shortcut:
    """The files of a new instance, copied from the first one."""
    parts = ("history", "schedules")

    def apply(patch: pytest.MonkeyPatch) -> None:
        from_config = dg.DagsterInstance.from_config

        def copied(config_dir: str, *arguments: str) -> dg.DagsterInstance:
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

        patch.setattr(dg.DagsterInstance, "from_config", staticmethod(copied))

    return apply


def _keep_jobs(patch: pytest.MonkeyPatch) -> None:
    """The same part of the same job, with the snapshot that a run records, made once."""
    as_ephemeral_job = dg.JobDefinition.as_ephemeral_job
    jobs: dict[tuple[int, frozenset[dg.AssetKey]], tuple[dg.JobDefinition, dg.JobDefinition]] = {}

    def kept(
        self: dg.JobDefinition,
        resource_defs: Any,
        input_values: Any,
        op_selection: Sequence[str] | None = None,
        asset_selection: Sequence[dg.AssetKey] | None = None,
    ) -> dg.JobDefinition:
        if resource_defs or input_values or op_selection:
            return as_ephemeral_job(self, resource_defs, input_values, op_selection, asset_selection)
        known = id(self), frozenset(asset_selection or ())
        if known not in jobs:
            part = as_ephemeral_job(self, resource_defs, input_values, None, asset_selection)
            jobs[known] = part, self  # while it is kept, no other job gets its id
            if len(jobs) > _JOBS_KEPT:
                jobs.pop(next(iter(jobs)))
        return jobs[known][0]

    patch.setattr(dg.JobDefinition, "as_ephemeral_job", kept)


def _capture_nothing(patch: pytest.MonkeyPatch) -> None:
    """No processes that copy what a run prints."""
    captured = import_module(f"{_SQLITE}.compute_log_manager").CapturedLogContext
    manager = import_module(f"{_SQLITE}.local_compute_log_manager").LocalComputeLogManager

    @contextmanager
    def nothing(_: Any, log_key: Sequence[str]) -> Iterator[Any]:
        yield captured(log_key)

    patch.setattr(manager, "capture_logs", nothing)


def _draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """No picture in the basis's metadata, which takes a tenth of a refresh."""
    from scalselect_assets.charts import in_dagster

    patch.setattr(in_dagster, "energy_curve", lambda *_: dg.MetadataValue.md(""))
