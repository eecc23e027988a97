"""Step 6, all shards: the budgeted choice.

Holds: the chosen samples in order of preference, and beside them (`subset_comparison`) what other strategies
choose on the same terms, measured alike. By default the N samples of highest leverage over the whole pool,
ties by `sample_key`, then shard. Refuses scores of other bases than the basis says, and terms that cannot be
met, with the numbers. Costs: the scores once, some 300 bytes of memory for every row of the pool, and what
the comparison costs (`comparison`).
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from scalselect_assets.asset_path import OutputHeader, PoolAsset, StoreState
from scalselect_assets.choice import advice, comparison, image_places, removed_samples
from scalselect_assets.choice.chooser import Chooser, comparison_metadata
from scalselect_assets.choice.lists import Lists
from scalselect_assets.choice.pool_rows import PoolRows
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts
from scalselect_assets.pool import raw_samples
from scalselect_assets.recording import cycle, data_versions
from scalselect_assets.recording.checks import require_passed
from scalselect_assets.recording.columns import SELECTED_SUBSET, column_schema
from scalselect_assets.recording.materialization import Output, at_work
from scalselect_assets.recording.partitions import missing_shards_check
from scalselect_assets.recording.records import Records
from scalselect_assets.resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.subspace import embedding_moments, importance_scores, subspace_basis
from scalselect_assets.subspace.basis_header import BasisHeader

if TYPE_CHECKING:
    from scalselect_assets.method.subspace.basis import Subspace

_UNKNOWN_NAMED = 100
"""Entries of lists that name no row, as far as they are recorded by name."""

NAME = "selected_subset"
CODE_VERSION = "4"
SUM_CHECK = "leverage_scores_sum_to_rank"
_SUM_TOLERANCE = 1e-5  # relative; the scores are within this of float64, and their errors do not add up


def provenance(selection: Selection, basis_version: str, lists_version: str, removed_version: str) -> str:
    """The hash of what the choice is computed from.

    Args:
        selection: The selection to choose for.
        basis_version: The version of the basis, which covers the scores of every shard in it.
        lists_version: `Lists.version`.
        removed_version: Version of the removed samples; empty where none are removed.
    """
    return data_versions.provenance(
        NAME,
        CODE_VERSION,
        choice=selection.choice_settings(),
        importance_scores=importance_scores.pool_version(basis_version),
        lists=lists_version,
        removed_samples=removed_version,
    )


def build(selection: Selection) -> dg.AssetsDefinition:
    """The asset for one selection."""

    @dg.asset(
        **selection.asset_options(NAME, by_shard=False),
        deps=[
            selection.key(name)
            for name in (
                importance_scores.NAME,
                subspace_basis.NAME,
                receipts.NAME,
                *([removed_samples.NAME] if selection.removes_samples else []),
            )
        ],
        kinds={"polars", "parquet"},
        code_version=data_versions.shown_code_version(CODE_VERSION, choice=selection.choice_settings()),
        metadata={"dagster/column_schema": column_schema(SELECTED_SUBSET)},
        check_specs=[
            dg.AssetCheckSpec(
                advice.CHECK,
                asset=selection.key(NAME),
                description="The chosen samples repeat each other no more than random ones do.",
            ),
            dg.AssetCheckSpec(
                SUM_CHECK,
                asset=selection.key(NAME),
                description="The scores of all shards sum to k, as leverage scores do.",
            ),
            dg.AssetCheckSpec(
                "selection_covers_every_shard",
                asset=selection.key(NAME),
                description="Every shard of the pool is scored and could be selected from.",
            ),
            dg.AssetCheckSpec(
                "listed_samples_are_in_the_pool",
                asset=selection.key(NAME),
                description="Every entry of the lists to include and to exclude names an embedded row.",
            ),
            dg.AssetCheckSpec(
                image_places.CHECK,
                asset=selection.key(NAME),
                description="In every row some text of the user follows the last image in the prompt, and so "
                "can attend to it.",
            ),
        ],
    )
    def selected_subset(context: dg.AssetExecutionContext, storage: StorageResource) -> dg.MaterializeResult:
        """The samples that the strategy prefers within the budget and its terms, over all shards."""
        with at_work(context, storage.locks(selection.store)):
            shards = sorted(Records(context.instance).known_shards(selection.name))
            return choose_subset(selection, storage, shards, cost=partial(_cost, context, selection)).result()

    return selected_subset


def choose_subset(
    selection: Selection,
    storage: StorageResource,
    shards: Sequence[str],
    *,
    cost: Callable[[BasisHeader], Mapping[str, Any]] = lambda _: {},
) -> Output:
    """Choose the subset, compare it with other strategies' and write both.

    Args:
        selection: The selection to choose for.
        storage: Opens pool and store.
        shards: All shards of the pool; a check names those that could not be chosen from.
        cost: Gives what this cycle has cost, as metadata.

    Raises:
        dg.Failure: The terms cannot be met, or a shard was scored with another basis.
        FailedCheckError: The scores do not sum to the rank; nothing was written.
    """
    start = time.monotonic()
    artifacts = storage.artifacts(selection.store)
    subspace, basis = subspace_basis.read_basis(artifacts)
    before = _last_selected(artifacts)
    lists = Lists.read(selection, storage)
    removed, removed_version = removed_samples.read_removed(artifacts, selection)
    pool = PoolRows(
        artifacts,
        storage.embeddings(selection.store),
        basis,
        selection.labels,
        with_images=bool(lists.include or lists.exclude),
    )
    with ExitStack() as stack:
        chooser = Chooser(selection, pool, subspace, lists, removed, before, stack)
        choice = chooser.choose()
        chosen, compared = chooser.chosen(choice), chooser.compared(choice)
        numbers = chooser.numbers(choice)
        places = image_places.image_places(
            chooser.rows, choice.rows, pool, subspace, unit_rows=selection.unit_rows
        )
    repetition = advice.repetition(compared)
    sums = _sum_check(chooser.rows, subspace)
    require_passed(sums)
    data_version = _content_version(chosen)
    made_from = provenance(selection, basis.data_version, lists.version, removed_version)
    stated = data_versions.header(
        data_version,
        made_from,
        subspace_basis=basis.data_version,
        unknown_listed=json.dumps(chooser.unknown[:_UNKNOWN_NAMED], ensure_ascii=False),
    )
    artifacts.write_frame(comparison.NAME, compared, stated)
    path, n_bytes = artifacts.write_frame(NAME, chosen, stated)
    return Output(
        data_version,
        made_from,
        {
            "dagster/row_count": chosen.height,
            "embedded": chooser.rows.height,
            **_churn(before, chosen),
            **numbers,
            "rank": subspace.k,
            "leverage_sum": float(chooser.rows["leverage"].to_numpy().sum()),
            "repeated_across_shards": chosen.height - chosen["sample_key"].n_unique(),
            "leverage_threshold": float(chosen["leverage"].to_numpy().min()),
            "normalised_leverage_threshold": float(chosen["normalised_leverage"].to_numpy().min()),
            "basis_version": basis.data_version,
            **{f"drift_{name}": value for name, value in basis.drift.items()},
            **places.metadata(),
            **comparison_metadata(compared),
            **({} if repetition is None else repetition.metadata()),
            **cost(basis),
            "seconds": time.monotonic() - start,
            "bytes": n_bytes,
            "dagster/uri": str(path),
        },
        (
            sums,
            missing_shards_check(
                "selection_covers_every_shard", [shard for shard in shards if shard not in basis.shards]
            ),
            _listed_check(chooser.unknown),
            advice.repetition_check(repetition),
            places.check(),
        ),
    )


def _sum_check(scores: pl.DataFrame, subspace: "Subspace") -> dg.AssetCheckResult:
    """Whether the scores of all rows sum to k, which normalised scores do where they sum to n."""
    normalised_sum = float(scores["normalised_leverage"].to_numpy().sum())
    wanted = subspace.n if subspace.k else 0
    return dg.AssetCheckResult(
        check_name=SUM_CHECK,
        passed=scores.height == subspace.n and abs(normalised_sum - wanted) <= _SUM_TOLERANCE * subspace.n,
        metadata={
            "leverage_sum": float(scores["leverage"].to_numpy().sum()),
            "normalised_mean": normalised_sum / scores.height,
            "rank": subspace.k,
            "scored": scores.height,
            "samples_in_basis": subspace.n,
            "tolerance": _SUM_TOLERANCE,
        },
    )


def _listed_check(unknown: tuple[str, ...]) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name="listed_samples_are_in_the_pool",
        passed=not unknown,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"n_unknown": len(unknown), "unknown": list(unknown[:_UNKNOWN_NAMED])},
    )


def _cost(context: dg.AssetExecutionContext, selection: Selection, basis: BasisHeader) -> Mapping[str, Any]:
    """The cost of this subset since the last one."""
    return cycle.since_last(
        context.instance,
        selection.key(NAME),
        selection.key(receipts.NAME),
        [
            selection.key(module.NAME)
            for module in (raw_samples, embedding_moments, subspace_basis, importance_scores)
        ],
        {shard: moments.rows for shard, moments in basis.shards.items()},
    ).metadata()


def _last_selected(artifacts: ArtifactStore) -> pl.DataFrame | None:
    """The samples that were selected last; none at first, and none from a damaged file."""
    try:
        return artifacts.read_frame(NAME, columns=["sample_key", "shard"])[0]
    except (ArtifactMissingError, ArtifactCorruptError):
        return None


def _churn(before: pl.DataFrame | None, chosen: pl.DataFrame) -> dict[str, int | float]:
    """The change from the last selection: samples that stayed, came and went, and the share that went."""
    if before is None:
        return {}
    stayed = before.join(chosen, on=["sample_key", "shard"], how="semi").height
    return {
        "stayed": stayed,
        "came": chosen.height - stayed,
        "went": before.height - stayed,
        "churn": (before.height - stayed) / max(before.height, 1),
    }


def _content_version(chosen: pl.DataFrame) -> str:
    chosen = chosen.drop("strongest_directions")  # which follow from the rest, up to rounding
    content = hashlib.sha256()
    for part in chosen.iter_slices(100_000):  # as text, a row takes some hundred bytes
        content.update(part.write_ndjson().encode())
    return digest(content.hexdigest())


def expected(state: StoreState) -> str:
    """The provenance that the choice would have now."""
    return provenance(
        state.selection,
        state.version(subspace_basis.ASSET),
        Lists.read(state.selection, state.storage).version,
        state.version(removed_samples.ASSET),
    )


def header(state: StoreState) -> OutputHeader:
    """The header of the choice; empty where it is missing or damaged."""
    return state.frame_header(NAME)


ASSET = PoolAsset(
    name=NAME,
    code_version=CODE_VERSION,
    build=build,
    expected=expected,
    header=header,
    error_checks=(SUM_CHECK,),
)
