"""The content of a Dagster process of this project: the declared selections, the resources, the instance.

Selections are read from files and never registered in code, so that the CLI, the UI and a daemon build the
same graph from the same declaration.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import dagster as dg

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.declaration.selection_file import SelectionFileError, read_selection
from scalselect_assets.embedding.device_pool import limit_devices
from scalselect_assets.graph import selection_defs
from scalselect_assets.operations.damaged_records import (
    DamagedRecordsError,
    copied_records,
    is_fault_of_records,
    is_writable,
    named_damage,
)
from scalselect_assets.recording import records
from scalselect_assets.resources.files import is_local
from scalselect_assets.resources.pool_listing import STORE_MARK
from scalselect_assets.resources.progress import LogProgress
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource

SELECTIONS_VARIABLE = "SCALSELECT_SELECTIONS"
"""Environment variable with declaration files, or folders of them, separated as in PATH."""

TICK_SETTLE_VARIABLE = "DAGSTER_AUTOMATION_TICK_SETTLE_SECONDS"
"""Dagster's environment variable; if above 0, only one tick acts on an event that is stored during a tick."""

DECLARATION = STORE_MARK
_DEFAULT_STORES = Path(".scalselect")
_DAGSTER_YAML = """\
# The Dagster instance of one ScalSelect store: runs, events and partitions, in SQLite beside this file.
telemetry:
  enabled: false
nux:
  enabled: false
concurrency:
  pools:
    granularity: run   # a refresh holds its model from its first shard to its last
    default_limit: 1   # runs that hold a model at the same time: the number of devices
run_monitoring:
  enabled: true        # a run whose process was killed is recorded as failed, and no longer counts
"""


def declared_selections() -> list[Selection]:
    """The selections that the environment declares, by default those of the stores in `./.scalselect`.

    Raises:
        SelectionFileError: A named file does not exist or is not valid, or two selections have the same name.
    """
    if named := os.environ.get(SELECTIONS_VARIABLE):
        entries = [named] if Path(named).exists() else named.split(os.pathsep)
        paths = [path for entry in entries for path in _declarations(Path(entry))]
    else:
        paths = sorted(_DEFAULT_STORES.glob(f"*/{DECLARATION}"))
    selections: dict[str, Path] = {}
    result = []
    for path in paths:
        selection = read_selection(path)
        if (other := selections.setdefault(selection.name, path)) != path:
            raise SelectionFileError(f"{path} and {other} both declare the selection {selection.name!r}")
        result.append(selection)
    return result


def _declarations(entry: Path) -> list[Path]:
    if entry.is_dir():
        return sorted([*entry.glob("*.yaml"), *entry.glob("*.yml")])
    if not entry.is_file():
        raise SelectionFileError(f"{SELECTIONS_VARIABLE} names {entry}, which does not exist")
    return [entry]


def default_resources() -> dict[str, Any]:
    """The resources that assets ask for, by name, for deployments that configure none."""
    return {"storage": StorageResource(), "vlm": VlmResource(), "progress": LogProgress()}


def build_defs(
    selections: Iterable[Selection], resource_overrides: Mapping[str, Any] | None = None
) -> dg.Definitions:
    """The graphs of all `selections` with one set of resources, some of them replaced."""
    return dg.Definitions.merge(
        *(selection_defs(selection) for selection in selections),
        dg.Definitions(
            resources={**default_resources(), **(resource_overrides or {})},
            # With a process for each step, every step would import torch and load the model.
            executor=dg.in_process_executor,
        ),
    )


def instance_folder(selection: Selection) -> Path:
    """The folder of a store's Dagster instance: in the store, or in `./.scalselect` for a remote store."""
    if "://" in selection.store and not selection.store.startswith("file:"):
        return (_DEFAULT_STORES / selection.name / "dagster").absolute()
    return Path(StorageResource().path(selection.store).path) / "dagster"


def open_instance(selection: Selection) -> dg.DagsterInstance:
    """The persistent instance of a selection's store, created on first use.

    Raises:
        OSError: Its folder cannot be written; the error names the folder, which SQLite's would not.
    """
    folder = instance_folder(selection)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_config(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}; Dagster's records must be writable", str(folder)
        ) from error
    with named_damage(folder):
        instance = _from_folder(folder)
        limit_devices(instance)
    return instance


@contextmanager
def opened_instance(selection: Selection, *, to_read: bool = False) -> Iterator[dg.DagsterInstance]:
    """The instance of a selection's store for the length of a block.

    Args:
        selection: The selection that the store belongs to.
        to_read: Whether nothing is to be recorded: then the store may be read-only.

    Raises:
        OSError: Its folder cannot be written, and it is not only to be read.
        DamagedRecordsError: A file of Dagster's is damaged; the message names it.
    """
    folder = instance_folder(selection)
    with ExitStack() as stack:
        stack.enter_context(named_damage(folder))
        if to_read and not (folder.exists() and is_writable(folder)):
            copy = stack.enter_context(copied_records(folder))
            copy.mkdir(exist_ok=True)
            _write_config(copy)
            yield stack.enter_context(_from_folder(copy))
            return
        yield stack.enter_context(open_instance(selection))


def is_writable_store(selection: Selection) -> bool:
    """Whether something can be written to a store; of one in an object store nothing is known beforehand."""
    root = StorageResource().path(selection.store)
    return not is_local(root) or is_writable(Path(root.path))


def _write_config(folder: Path) -> None:
    config = folder / "dagster.yaml"
    if not config.exists():
        config.write_text(_DAGSTER_YAML, encoding="utf-8")


def _from_folder(folder: Path) -> dg.DagsterInstance:
    try:
        return records.open_instance(folder)
    except OSError:
        raise
    # A damaged configuration or a damaged schema ends in errors of YAML, Dagster, SQLAlchemy or Alembic.
    except Exception as error:
        if is_fault_of_records(error):
            raise
        raise DamagedRecordsError(
            f"Dagster's records in {folder} cannot be opened ({type(error).__name__}: {error}); correct "
            "dagster.yaml there, or move that folder away and run again: results and vectors stay and are "
            "taken over, only the history of runs is lost"
        ) from error
