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
from collections.abc import Mapping
from contextlib import ExitStack

import dagster as dg
import polars as pl

from scalselect_assets.choice import comparison, removed_samples
from scalselect_assets.choice.chooser import Chooser, comparison_metadata
from scalselect_assets.choice.lists import Lists
from scalselect_assets.choice.pool_rows import PoolRows
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts
from scalselect_assets.pool import raw_samples
from scalselect_assets.recording import cycle, data_versions
from scalselect_assets.recording.columns import SELECTED_SUBSET, column_schema
from scalselect_assets.recording.materialization import Output, at_work
from scalselect_assets.recording.partitions import missing_shards_check
from scalselect_assets.recording.records import Records
from scalselect_assets.resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.subspace import embedding_moments, importance_scores, subspace_basis

NAME = "selected_subset"
CODE_VERSION = "3"
_SUM_TOLERANCE = 1e-5  # relative; the scores are within this of float64, and their errors do not add up


def provenance(selection: Selection, basis_version: str, lists_version: str, removed_version: str) -> str:
    """What the choice is computed from.

    Args:
        selection: What is asked for.
        basis_version: The version of the basis, which covers the scores of every shard in it.
        lists_version: `Lists.version`.
        removed_version: Of the removed samples; empty where none are removed.
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
                "leverage_scores_sum_to_rank",
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
        ],
    )
    def selected_subset(context: dg.AssetExecutionContext, storage: StorageResource) -> dg.MaterializeResult:
        """The samples that the strategy prefers within the budget and its terms, over all shards."""
        with at_work(context, storage.locks(selection.store)), ExitStack() as stack:
            start = time.monotonic()
            artifacts = storage.artifacts(selection.store)
            subspace, basis = subspace_basis.read_basis(artifacts)
            in_basis = json.loads(basis["shards"])
            pool = sorted(Records(context.instance).known_shards(selection.name))
            before = _last_selected(artifacts)
            lists = Lists.read(selection, storage)
            removed, removed_version = removed_samples.read_removed(artifacts, selection)
            chooser = Chooser(
                selection,
                PoolRows(
                    artifacts,
                    storage.embeddings(selection.store),
                    basis["data_version"],
                    in_basis,
                    selection.labels,
                    with_images=bool(lists.include or lists.exclude),
                ),
                subspace,
                lists,
                removed,
                before,
                stack,
            )
            chosen, compared = chooser.chosen(), chooser.compared()
            data_version = _content_version(chosen)
            made_from = provenance(selection, basis["data_version"], lists.version, removed_version)
            header = data_versions.header(data_version, made_from, subspace_basis=basis["data_version"])
            artifacts.write_frame(comparison.NAME, compared, header)
            path, n_bytes = artifacts.write_frame(NAME, chosen, header)
            scores = chooser.rows
            normalised_sum, leverage_sum = (
                float(scores[name].to_numpy().sum()) for name in ("normalised_leverage", "leverage")
            )
            return Output(
                data_version,
                made_from,
                {
                    "dagster/row_count": chosen.height,
                    "embedded": scores.height,
                    **_churn(before, chosen),
                    **chooser.told(),
                    "rank": subspace.k,
                    "leverage_sum": leverage_sum,
                    "repeated_across_shards": chosen.height - chosen["sample_key"].n_unique(),
                    "leverage_threshold": float(chosen["leverage"].to_numpy().min()),
                    "normalised_leverage_threshold": float(chosen["normalised_leverage"].to_numpy().min()),
                    "basis_version": basis["data_version"],
                    **{f"drift_{name}": value for name, value in json.loads(basis["drift"]).items()},
                    **comparison_metadata(compared),
                    **_cycle(context, selection, in_basis).metadata(),
                    "seconds": time.monotonic() - start,
                    "bytes": n_bytes,
                    "dagster/uri": str(path),
                },
                (
                    dg.AssetCheckResult(
                        check_name="leverage_scores_sum_to_rank",
                        passed=scores.height == subspace.n
                        and (
                            abs(normalised_sum - subspace.n) <= _SUM_TOLERANCE * subspace.n
                            if subspace.k
                            else normalised_sum <= _SUM_TOLERANCE * subspace.n
                        ),
                        metadata={
                            "leverage_sum": leverage_sum,
                            "normalised_mean": normalised_sum / scores.height,
                            "rank": subspace.k,
                            "scored": scores.height,
                            "samples_in_basis": subspace.n,
                            "tolerance": _SUM_TOLERANCE,
                        },
                    ),
                    missing_shards_check(
                        "selection_covers_every_shard", [shard for shard in pool if shard not in in_basis]
                    ),
                    _listed_check(chooser.unknown),
                ),
            ).result()

    return selected_subset


def _listed_check(unknown: tuple[str, ...]) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name="listed_samples_are_in_the_pool",
        passed=not unknown,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"n_unknown": len(unknown), "unknown": list(unknown[:100])},
    )


def _cycle(
    context: dg.AssetExecutionContext, selection: Selection, in_basis: Mapping[str, Mapping[str, str]]
) -> cycle.Cycle:
    """What this subset cost, from the last one on."""
    return cycle.since_last(
        context.instance,
        selection.key(NAME),
        selection.key(receipts.NAME),
        [
            selection.key(module.NAME)
            for module in (raw_samples, embedding_moments, subspace_basis, importance_scores)
        ],
        {shard: int(moments["rows"]) for shard, moments in in_basis.items()},
    )


def _last_selected(artifacts: ArtifactStore) -> pl.DataFrame | None:
    """The samples that were selected last; none at first, and none from a damaged file."""
    try:
        return artifacts.read_frame(NAME, columns=["sample_key", "shard"])[0]
    except (ArtifactMissingError, ArtifactCorruptError):
        return None


def _churn(before: pl.DataFrame | None, chosen: pl.DataFrame) -> dict[str, int | float]:
    """What became of the last selection: how many samples stayed, came and went, and the share that went."""
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
