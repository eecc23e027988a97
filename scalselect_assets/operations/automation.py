"""The conditions of declarative automation, with which Dagster materializes assets without the refresh.

This module holds a condition for each asset; `sensors` holds the sensor that evaluates them. A selection has
either the refresh and its schedule, or the conditions and their sensors, never both; all of them are off
until a person turns them on.

How the conditions work together. An asset is *due* from the tick on which one of its inputs has changed until
the asset is requested. A due asset is requested as soon as nothing before it on the path is due or in
progress. A wave of changes therefore runs through the path once: the shards, each in one run, then the basis,
the scores, and the subset with the training dataset. Shards and the basis in turn wait while anything after
the basis is in progress, so that no input changes between a run's reading and its writing. An asset that
failed is not due until something before it changes: it is not tried again and again, and nothing waits for
it.

*Nightly* delays the begin of a wave (a new or changed file, a removed shard, changed settings) until the next
tick of ``nightly_cron``; everything that follows runs at once. A shard that is found during the night's wave
is not part of it and does not delay it.

Data versions decide what has changed: an output that comes out the same changes nothing. On the first
evaluation after the sensor is turned on, only missing outputs count as changed, so bring a selection up to
date with a refresh before you turn the sensor on. Two ticks may see an event that is stored while the first
of them looks, and both then follow it; a daemon with DAGSTER_AUTOMATION_TICK_SETTLE_SECONDS above 0 in its
environment sees each event once.

Costs: some hundred conditions per tick, whatever the number of shards; and one run, with a process of its
own, per shard for its vectors and another for its scores.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import dagster as dg

from scalselect_assets.asset_path import path_of
from scalselect_assets.choice import removed_samples, selected_subset
from scalselect_assets.dataset import training_manifest
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts
from scalselect_assets.pool import raw_samples
from scalselect_assets.pool.discovery import SHARD_FILES, SHARD_MANIFEST
from scalselect_assets.subspace import embedding_moments, importance_scores, subspace_basis

AC = dg.AutomationCondition
Condition: TypeAlias = dg.AutomationCondition[Any]

RAW, EMBEDDINGS, MOMENTS = raw_samples.NAME, receipts.NAME, embedding_moments.NAME
BASIS, SCORES = subspace_basis.NAME, importance_scores.NAME
REMOVED, SUBSET, DATASET = removed_samples.NAME, selected_subset.NAME, training_manifest.NAME

AUTOMATION_TAG = "scalselect/automation"
"""Tag of every run that the conditions request; its value is the selection's name."""


def automation_condition(selection: Selection, asset: str) -> Condition | None:
    """The condition on which Dagster requests ``asset``; None if the refresh drives the selection.

    An asset that has no condition of its own here follows the one before it on the path.
    """
    if not selection.is_declarative:
        return None
    conditions: dict[str, Callable[[Selection], Condition]] = {
        RAW: raw_samples_condition,
        EMBEDDINGS: attention_embeddings_condition,
        MOMENTS: embedding_moments_condition,
        BASIS: subspace_basis_condition,
        SCORES: importance_scores_condition,
        REMOVED: removed_samples_condition,
        SUBSET: selected_subset_condition,
        DATASET: training_dataset_condition,
    }
    if condition := conditions.get(asset):
        return condition(selection)
    names = [step.name for step in path_of(selection)]
    return following_condition(selection, names[names.index(asset) - 1])


# The conditions, in path order


def raw_samples_condition(selection: Selection) -> Condition:
    """Fires for a shard whose file or images are new or changed, or if the image root changes.

    Waits for the shard's own vectors and for assets over all shards, which would otherwise be of two versions
    of it. It would loop if reading a shard changed what discovery sees of it.
    """
    moments = AC.asset_matches(selection.key(MOMENTS), AC.run_in_progress())
    return (
        _raw_due(selection)
        & ~AC.any_deps_missing()
        # A file that is reported during a tick counts as changed on the next one.
        & ~(AC.newly_missing() & ~_file_changed(selection))
        & ~AC.run_in_progress()
        & ~AC.asset_matches(selection.key(EMBEDDINGS), AC.run_in_progress() | moments)
        & ~AC.asset_matches(selection.key(BASIS), _in_progress_from_basis(selection))
    )


def attention_embeddings_condition(selection: Selection) -> Condition:
    """Fires for a shard with its rows, in one run with them, and for all shards if the model changes.

    If that run fails before this asset, the condition does not fire until the file changes again. It would
    loop if embedding a shard materialized its rows.
    """
    return (
        _due_with(selection, RAW)
        & AC.asset_matches(selection.key(RAW), _present_and_quiet())
        & ~AC.run_in_progress()
        & ~AC.asset_matches(selection.key(MOMENTS), AC.run_in_progress())
        & ~AC.asset_matches(selection.key(BASIS), _in_progress_from_basis(selection))
    )


def embedding_moments_condition(selection: Selection) -> Condition:
    """Fires for a shard with its vectors, in one run with them, and for all shards if their scaling changes.

    It would loop if the moments of a shard materialized its vectors.
    """
    return (
        _due_with(selection, EMBEDDINGS)
        & AC.asset_matches(selection.key(EMBEDDINGS), _present_and_quiet())
        & ~AC.run_in_progress()
        & ~AC.asset_matches(selection.key(BASIS), _in_progress_from_basis(selection))
    )


def subspace_basis_condition(selection: Selection) -> Condition:
    """Fires once for any number of shards that came, went or changed, or if the rank rule changes.

    Waits for all shards that are due or in progress, so it does not fire while files arrive faster than they
    are embedded, and for the assets after it. A shard that failed is left out. Moments that come out the same
    do not fire it. It would loop if making a basis changed the moments of a shard or the set of shards.
    """
    return _basis_due(selection) & ~_shards_busy(selection) & ~_in_progress_from_basis(selection)


def importance_scores_condition(selection: Selection) -> Condition:
    """Fires for all shards when the basis has another version, one run for each shard.

    Waits for a basis that is about to be made, and does not fire if making it failed. A shard without
    vectors gets no scores. It would loop if scoring a shard made a basis.
    """
    unsettled = _basis_busy(selection) | AC.execution_failed()
    return _scores_due(selection) & ~AC.run_in_progress() & ~AC.asset_matches(selection.key(BASIS), unsettled)


def removed_samples_condition(selection: Selection) -> Condition:
    """Fires once when scores or the basis have another version, after all scores; or if its settings change.

    Changed evaluation files do not fire it; the next run reads them. A shard whose scoring failed stops it.
    It would loop if looking for duplicates scored a shard.
    """
    return (
        _subset_due(selection)
        & _all_scored(selection)
        & ~AC.run_in_progress()
        & ~AC.asset_matches(selection.key(SUBSET), AC.run_in_progress())
    )


def selected_subset_condition(selection: Selection) -> Condition:
    """Fires once when scores or the basis have another version, after all scores; or if the budget changes.

    Where samples are removed first, it fires together with their removal, in one run. A shard whose scoring
    failed stops it, since scores of two bases cannot be compared. It would loop if selecting scored a shard.
    """
    due = _subset_due(selection)
    if selection.removes_samples:
        removed = AC.asset_matches(selection.key(REMOVED), AC.will_be_requested())
        changed = AC.asset_matches(selection.key(REMOVED), _changed_by_others(selection))
        due = (due | removed | _due(changed)) & AC.asset_matches(selection.key(REMOVED), _present_and_quiet())
    return (
        due
        & _all_scored(selection)
        & ~AC.run_in_progress()
        & ~AC.asset_matches(selection.key(DATASET), AC.run_in_progress())
    )


def training_dataset_condition(selection: Selection) -> Condition:
    """Fires with the subset, in one run with it; alone after a basis of the same version, or if text is kept.

    When a shard comes that cannot be read, the basis is made again and keeps its version, and the manifest
    must name the shard as left out. It would loop if writing the dataset made a subset or a basis.
    """
    subset = AC.asset_matches(selection.key(SUBSET), _changed_by_others(selection))
    basis = AC.asset_matches(selection.key(BASIS), AC.newly_updated())
    with_subset = AC.asset_matches(selection.key(SUBSET), AC.will_be_requested())
    unselected = (_subset_due(selection) | AC.missing()) & ~AC.will_be_requested()
    return (
        (with_subset | _due(subset | basis) | _begun(selection, AC.code_version_changed()))
        & ~AC.run_in_progress()
        & ~AC.asset_matches(selection.key(BASIS), _basis_busy(selection))
        & ~AC.asset_matches(selection.key(SCORES), _scores_due(selection) | AC.run_in_progress())
        & ~AC.asset_matches(selection.key(SUBSET), unselected | AC.run_in_progress())
    )


def following_condition(selection: Selection, before: str) -> Condition:
    """Fires with the asset ``before`` it on the path, in one run with it, or if its settings change.

    This is how the report follows the training dataset. It would loop if an asset changed what it follows.
    """
    with_it = AC.asset_matches(selection.key(before), AC.will_be_requested())
    changed = AC.asset_matches(selection.key(before), _changed_by_others(selection))
    return (
        (with_it | _due(changed) | _begun(selection, AC.code_version_changed()))
        & AC.asset_matches(selection.key(before), _present_and_quiet())
        & ~AC.run_in_progress()
    )


# Conditions on which an asset is due. The conditions of later assets contain them, too. Dagster stores the
# state of a `since` under the asset and the kinds of its two outermost conditions, so no two `since` of one
# asset may agree in these kinds.


def _due(trigger: Condition) -> Condition:
    """From the tick on which ``trigger`` is true until the asset is requested.

    A materialization does not end it, since a run in progress has read the earlier inputs.
    """
    return trigger.since(AC.newly_requested()).with_label("due")


def _begun(selection: Selection, change: Condition, missing: Condition | None = None) -> Condition:
    """Like ``_due``, for a trigger that begins a wave: a ``change``, or a ``missing`` output of the asset.

    By default, an output that is newly missing triggers it. A change that is first seen on the tick after a
    request came later than the request, and makes the asset due again. In nightly automation, the asset is
    due from the next tick of the cron on.
    """
    trigger = (missing or AC.newly_missing()) | change
    pending = trigger.since(AC.newly_requested() & ~change).with_label("begun")
    if selection.automation != "declarative_nightly":
        return pending
    tick = AC.cron_tick_passed(selection.nightly_cron, selection.nightly_timezone)
    return _due(pending & tick)


def _changed_by_others(selection: Selection) -> Condition:
    """A new version that no run of this automation made; such a run also materializes the assets after it."""
    ours = AC.any_new_update_has_run_tags(tag_values={AUTOMATION_TAG: selection.name})
    return AC.data_version_changed() & ~ours


def _due_with(selection: Selection, before: str) -> Condition:
    """Due in a shard where the asset ``before`` it is requested or has changed, or if settings change.

    Unlike in ``_due``, a materialization ends it, since the lock of a shard orders its readers and writers.
    """
    changed = AC.asset_matches(selection.key(before), _changed_by_others(selection))
    return (
        AC.asset_matches(selection.key(before), AC.will_be_requested())
        | changed.since(AC.newly_requested() | AC.newly_updated())
        | _begun(selection, AC.code_version_changed())
    )


def _file_changed(selection: Selection) -> Condition:
    return AC.asset_matches(selection.key(SHARD_FILES), AC.newly_updated())


def _raw_due(selection: Selection) -> Condition:
    # A new shard is due when its file is reported, unless that was before the automation began.
    reported = AC.asset_matches(selection.key(SHARD_FILES), ~AC.missing())
    change = _file_changed(selection) | AC.code_version_changed()
    return _begun(selection, change, AC.newly_missing() & reported)


def _basis_due(selection: Selection) -> Condition:
    shard_set = AC.asset_matches(selection.key(SHARD_MANIFEST), AC.newly_updated())
    due = _due(AC.asset_matches(selection.key(MOMENTS), AC.data_version_changed())) | _begun(
        selection, shard_set | AC.code_version_changed()
    )
    some_moments = AC.asset_matches(selection.key(MOMENTS), ~AC.missing())
    return (due & some_moments).with_label(f"{BASIS} due")


def _scores_due(selection: Selection) -> Condition:
    # A basis with other settings may keep its version and still change which shards keep their scores.
    settings = AC.code_version_changed() | AC.asset_matches(selection.key(BASIS), AC.code_version_changed())
    due = _due(AC.asset_matches(selection.key(BASIS), AC.data_version_changed())) | _begun(
        selection, settings
    )
    return (due & ~AC.any_deps_missing()).with_label(f"{SCORES} due")


def _subset_due(selection: Selection) -> Condition:
    due = _due(
        AC.asset_matches(selection.key(SCORES), AC.data_version_changed())
        | AC.asset_matches(selection.key(BASIS), AC.data_version_changed())
    ) | _begun(selection, AC.code_version_changed())
    some_scores = AC.asset_matches(selection.key(SCORES), ~AC.missing())
    return (due & some_scores).with_label(f"{SUBSET} due")


# Conditions that an asset waits for


def _all_scored(selection: Selection) -> Condition:
    """For assets after the scores: no basis and no scores are due, in progress or failed."""
    unscored = _scores_due(selection) | AC.run_in_progress() | AC.execution_failed()
    return ~AC.asset_matches(selection.key(BASIS), _basis_busy(selection)) & ~AC.asset_matches(
        selection.key(SCORES), unscored
    )


def _present_and_quiet() -> Condition:
    """The asset is materialized, or will be in the same run, and no run of it is in progress."""
    return ~(AC.missing() & ~AC.will_be_requested()) & ~AC.run_in_progress()


def _shards_busy(selection: Selection) -> Condition:
    """For the basis: a shard is due or in progress."""
    changed = _begun(selection, AC.code_version_changed())
    has_rows = AC.asset_matches(selection.key(RAW), ~AC.missing())
    has_vectors = AC.asset_matches(selection.key(EMBEDDINGS), ~AC.missing())
    return (
        AC.asset_matches(selection.key(RAW), _raw_due(selection) | AC.run_in_progress())
        | AC.asset_matches(selection.key(EMBEDDINGS), (changed & has_rows) | AC.run_in_progress())
        | AC.asset_matches(selection.key(MOMENTS), (changed & has_vectors) | AC.run_in_progress())
    ).with_label("a shard is due or in progress")


def _basis_busy(selection: Selection) -> Condition:
    """For the basis: the basis itself or a shard is due or in progress."""
    return _basis_due(selection) | AC.run_in_progress() | _shards_busy(selection)


def _in_progress_from_basis(selection: Selection) -> Condition:
    """For the basis: the basis, the scores of any shard, or an asset after them is in progress."""
    busy: Condition = AC.run_in_progress()
    names = [step.name for step in path_of(selection)]
    for asset in names[names.index(SCORES) :]:
        busy |= AC.asset_matches(selection.key(asset), AC.run_in_progress())
    return busy
