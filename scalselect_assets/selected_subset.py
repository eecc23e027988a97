"""Step 6, all shards: the budgeted choice.

Holds: the N samples of highest leverage over the whole pool, ranked, ties by `sample_key`, then shard.
Refuses scores of different bases. Costs: one pass over the scores; memory of N rows and one shard.
"""

import hashlib
import json
import time

import dagster as dg
import polars as pl

from resources.artifacts import ArtifactStore
from resources.identity import digest
from resources.storage import StorageResource
from scalselect_assets import importance_scores, lineage, subspace_basis
from scalselect_assets.partitions import missing_shards_check, pool_shards
from scalselect_assets.selection import Selection
from scalselect_assets.tables import IMPORTANCE_SCORES, SELECTED_SUBSET, column_schema, polars_schema

NAME = "selected_subset"
CODE_VERSION = "1"
_SUM_TOLERANCE = 1e-6  # relative to k; float64 sums of a billion scores stay far below it


def provenance(selection: Selection, score_version: str) -> str:
    """What the choice is computed from; one version covers the scores of every shard in the basis."""
    return lineage.provenance(
        NAME, CODE_VERSION, budget=repr(selection.budget), importance_scores=score_version
    )


def build(selection: Selection) -> dg.AssetsDefinition:
    """The asset for one selection."""

    @dg.asset(
        **selection.asset_options(NAME, by_shard=False),
        deps=[selection.key(importance_scores.NAME), selection.key(subspace_basis.NAME)],
        kinds={"polars", "parquet"},
        code_version=CODE_VERSION,
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
        ],
    )
    def selected_subset(context: dg.AssetExecutionContext, storage: StorageResource) -> dg.MaterializeResult:
        """The samples of highest leverage within the budget, over all shards."""
        from scalselect_assets.method.selection import budget_size

        start = time.monotonic()
        artifacts = storage.artifacts(selection.store)
        subspace, basis = subspace_basis.read_basis(artifacts)
        scored = json.loads(basis["shards"])
        pool = pool_shards(context, selection.partitions)
        size = budget_size(selection.budget, subspace.n)
        chosen, leverage_sum, n_scored = top_of_shards(artifacts, sorted(scored), basis["data_version"], size)
        data_version = digest(hashlib.sha256(chosen.write_ndjson().encode()).hexdigest())
        made_from = provenance(selection, importance_scores.provenance(basis["data_version"]))
        path, n_bytes = artifacts.write_frame(
            NAME, chosen, lineage.header(data_version, made_from, subspace_basis=basis["data_version"])
        )
        return lineage.result(
            data_version,
            made_from,
            {
                "dagster/row_count": chosen.height,
                "embedded": n_scored,
                "rank": subspace.k,
                "leverage_sum": leverage_sum,
                "repeated_across_shards": chosen.height - chosen["sample_key"].n_unique(),
                "leverage_threshold": float(chosen["leverage"][-1]),
                "basis_version": basis["data_version"],
                "seconds": time.monotonic() - start,
                "bytes": n_bytes,
                "dagster/uri": str(path),
            },
            [
                dg.AssetCheckResult(
                    check_name="leverage_scores_sum_to_rank",
                    passed=abs(leverage_sum - subspace.k) <= _SUM_TOLERANCE * max(1, subspace.k)
                    and n_scored == subspace.n,
                    metadata={
                        "leverage_sum": leverage_sum,
                        "rank": subspace.k,
                        "scored": n_scored,
                        "samples_in_basis": subspace.n,
                    },
                ),
                missing_shards_check(
                    "selection_covers_every_shard", [shard for shard in pool if shard not in scored]
                ),
            ],
        )

    return selected_subset


def top_of_shards(
    artifacts: ArtifactStore, shards: list[str], basis_version: str, size: int
) -> tuple[pl.DataFrame, float, int]:
    """The `size` rows of highest leverage over all `shards`, and the sum and number of all scores.

    Raises:
        dg.Failure: A shard was scored with another basis than `basis_version`.
    """
    top = pl.DataFrame(schema={**polars_schema(IMPORTANCE_SCORES), "shard": pl.String()})
    leverage_sum, n_scored = 0.0, 0
    for shard in shards:
        scores, header = artifacts.read_frame(importance_scores.NAME, shard)
        if header["subspace_basis"] != basis_version:
            raise dg.Failure(
                f"shard {shard!r} was scored with basis {header['subspace_basis']}, the basis is now "
                f"{basis_version}; scores of different bases cannot be compared: materialize "
                f"importance_scores[{shard}] again",
                allow_retries=False,
            )
        leverage_sum += float(scores["leverage"].sum())
        n_scored += scores.height
        top = (
            pl.concat([top, scores.with_columns(shard=pl.lit(shard))])
            # Exact repeats of a sample in two shards share key and score; the shard makes the order total.
            .sort(["leverage", "sample_key", "shard"], descending=[True, False, False])
            .head(size)
        )
    ranked = top.with_row_index("rank", offset=1).cast({"rank": pl.Int64()})
    return ranked.select(polars_schema(SELECTED_SUBSET).names()), leverage_sum, n_scored
