"""Cleaning a store: it removes what nothing refers to any more, once that has lasted the retention time.

Nothing else of the project deletes what took work to make, so a store grows: replaced tables keep their old
versions, a second model has tables of its own, shards leave the pool, killed processes leave files behind.
`clean` removes these, alone on the store; `Kind` lists them. What a receipt of a shard in the pool names
stays, and so does what the basis, the pool's totals or the manifest name, whatever its age.

Time. A thing's age counts from the later of two times: its own (of its files or table versions, or of what
replaced them) and, for shards that left the pool and for tables of another model, the time when a cleaning
first found them unneeded, which is noted in the store: that a disk was away for a night, or that a selection
goes back to its last model, must not cost what was computed months ago. So these go at the second cleaning
at the earliest, unless the retention time is 0. Times in the future count as now: a clock that went back, or
files and notes from when it was ahead, make a cleaning remove less. Under a clock that is ahead, unneeded
things go too early by as much, which cannot be told from time that passed; what is referred to never goes:
a table's needed versions are tagged meanwhile, and LanceDB refuses to remove those.

Crashes. What refers goes before what is referred to (a receipt before its table), and a part of a shard's
outputs counts as none, so after a kill at any point the store is whole for a refresh, and the next cleaning
goes on. Costs: one stat per file, a header or a receipt per shard, opening each table (milliseconds).
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
    """Remove from a selection's store what nothing has needed for the retention time.

    Args:
        selection: Whose store.
        storage: Opens pool and store.
        instance: Knows the shards that the last refresh found.
        retention: How long a thing must have been unneeded.
        dry_run: Delete nothing, and say what would go.

    Raises:
        StoreBusyError: Somebody is at work on the store.
        ArtifactCorruptError: Basis, totals or manifest cannot be read, so what they need is not known.
        FileNotFoundError: The pool does not exist, so which shards left it is not known.
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
