"""Cleaning a store: it deletes what nothing has referred to for the retention time.

No other code of the project deletes results, so a store grows: replaced tables keep their old versions, a
second model has tables of its own, shards leave the pool, killed processes leave files behind. `clean`
deletes these while nobody else works on the store; `Kind` lists them. A table or file stays, whatever its
age, if a receipt of a shard in the pool, the basis, the pool's totals or the manifest names it.

Time. Removed shards and other models' tables are deleted only when a second cleaning also finds them unused,
so that a disk unmounted for a night, or a selection that returns to its last model, loses nothing. Their age
counts from the first cleaning that found them unused, which the store notes, or from their newest file if
that is later. The age of everything else counts from its files or table versions, or from those that replaced
them. With a retention time of 0, one cleaning is enough. Times in the future count as now: a clock that was
set back, or files from when it was ahead, make a cleaning delete less. If the clock is ahead, unused things
are deleted too early by as much, since no program can see the difference. Nothing that is referred to is ever
deleted: the needed versions of a table are tagged meanwhile, and LanceDB refuses to remove tagged versions.

Crashes. References are deleted before their targets (a receipt before its table), and a shard with only some
of its outputs is treated as having none. After a kill at any point a refresh can therefore work on the store,
and the next cleaning continues. Costs: one stat per file, a header or a receipt per shard, and opening each
table (milliseconds).
"""

from dataclasses import replace
from datetime import timedelta

import dagster as dg

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.operations.leftovers import MaintenanceReport
from scalselect_assets.operations.survey import Survey
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.table_versions import TableRefusedError


def clean(
    selection: Selection,
    storage: StorageResource,
    instance: dg.DagsterInstance,
    *,
    retention: timedelta,
    dry_run: bool = False,
) -> MaintenanceReport:
    """Delete from a selection's store what nothing has needed for the retention time.

    Args:
        selection: The selection whose store is cleaned.
        storage: Opens pool and store.
        instance: The instance that knows the shards of the last refresh.
        retention: The time for which a thing must have been unneeded.
        dry_run: Whether to delete nothing and only report what would be deleted.

    Raises:
        StoreBusyError: Somebody is at work on the store.
        ArtifactCorruptError: Basis, totals or manifest cannot be read, so it is unknown what they need.
        FileNotFoundError: The pool does not exist, so it is unknown which shards left it.
        ValueError: The retention time is negative.
    """
    if retention < timedelta(0):
        raise ValueError(f"Got a retention time of {retention}; it is zero or more.")
    removed, kept = [], []
    with storage.locks(selection.store).alone():
        survey = Survey(selection, storage, instance, retention.total_seconds())
        found = list(survey.found())
        if not dry_run:
            survey.write_notes()
        for leftover, remove in found:
            if remove is None:
                kept.append(leftover)
                continue
            try:
                if not dry_run:
                    remove()
            except TableRefusedError as error:
                kept.append(replace(leftover, why=str(error)))
            else:
                removed.append(leftover)
    return MaintenanceReport(tuple(removed), tuple(kept), retention, dry_run)
