"""Step 6, all shards: the budgeted choice.

Holds: the N samples of highest leverage over the whole pool, ranked, ties by `sample_key`, then shard.
Refuses scores of other bases than the basis says. Costs: two or three passes over a column of the scores and
one over the rest; memory of N rows, one shard, and a few megabytes.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence

import dagster as dg
import numpy as np
import polars as pl
from numpy.typing import NDArray

from resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from resources.identity import digest
from resources.storage import StorageResource
from scalselect_assets import (
    attention_embeddings,
    cycle,
    embedding_moments,
    importance_scores,
    lineage,
    raw_samples,
    subspace_basis,
)
from scalselect_assets.basis_history import ScorePlan
from scalselect_assets.materialization import Output, at_work
from scalselect_assets.method.top_n import nth_largest
from scalselect_assets.partitions import missing_shards_check, pool_shards
from scalselect_assets.selection import Selection
from scalselect_assets.tables import SELECTED_SUBSET, column_schema, polars_schema

NAME = "selected_subset"
CODE_VERSION = "2"
_SUM_TOLERANCE = 1e-5  # relative; the scores are within this of float64, and their errors do not add up


def provenance(selection: Selection, score_version: str) -> str:
    """What the choice is computed from; `ScorePlan.version` covers the scores of every shard in the basis."""
    return lineage.provenance(
        NAME, CODE_VERSION, budget=repr(selection.budget), importance_scores=score_version
    )


def build(selection: Selection) -> dg.AssetsDefinition:
    """The asset for one selection."""

    @dg.asset(
        **selection.asset_options(NAME, by_shard=False),
        deps=[selection.key(importance_scores.NAME), selection.key(subspace_basis.NAME)],
        kinds={"polars", "parquet"},
        code_version=lineage.shown_code_version(CODE_VERSION, budget=selection.budget),
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

        with at_work(context, storage.locks(selection.store)):
            start = time.monotonic()
            artifacts = storage.artifacts(selection.store)
            subspace, basis = subspace_basis.read_basis(artifacts)
            plan = ScorePlan.from_header(basis)
            in_basis = json.loads(basis["shards"])
            pool = pool_shards(context, selection.partitions)
            scores = PoolScores(artifacts, plan, sorted(in_basis))
            chosen = scores.top(budget_size(selection.budget, subspace.n))
            before = _last_selected(artifacts)
            data_version = _content_version(chosen)
            made_from = provenance(selection, plan.version)
            path, n_bytes = artifacts.write_frame(
                NAME, chosen, lineage.header(data_version, made_from, subspace_basis=basis["data_version"])
            )
            # Where shards keep scores of earlier bases, the sum is off by the bound on their errors at most.
            tolerance = _SUM_TOLERANCE + plan.error_bound
            return Output(
                data_version,
                made_from,
                {
                    "dagster/row_count": chosen.height,
                    "embedded": scores.n,
                    **_churn(before, chosen),
                    "rank": subspace.k,
                    "leverage_sum": scores.leverage_sum,
                    "repeated_across_shards": chosen.height - chosen["sample_key"].n_unique(),
                    "leverage_threshold": float(chosen["leverage"][-1]),
                    "normalised_leverage_threshold": float(chosen["normalised_leverage"][-1]),
                    "shards_keeping_scores": len(plan.kept),
                    "score_error_bound": plan.error_bound,
                    "basis_version": basis["data_version"],
                    **{f"drift_{name}": value for name, value in json.loads(basis["drift"]).items()},
                    **_cycle(context, selection, in_basis).metadata(),
                    "seconds": time.monotonic() - start,
                    "bytes": n_bytes,
                    "dagster/uri": str(path),
                },
                (
                    dg.AssetCheckResult(
                        check_name="leverage_scores_sum_to_rank",
                        passed=scores.n == subspace.n
                        and (
                            abs(scores.normalised_sum - subspace.n) <= tolerance * subspace.n
                            if subspace.k
                            else scores.normalised_sum <= tolerance * subspace.n
                        ),
                        metadata={
                            "leverage_sum": scores.leverage_sum,
                            "normalised_mean": scores.normalised_sum / scores.n,
                            "rank": subspace.k,
                            "scored": scores.n,
                            "samples_in_basis": subspace.n,
                            "tolerance": tolerance,
                        },
                    ),
                    missing_shards_check(
                        "selection_covers_every_shard", [shard for shard in pool if shard not in in_basis]
                    ),
                ),
            ).result()

    return selected_subset


def _cycle(
    context: dg.AssetExecutionContext, selection: Selection, in_basis: Mapping[str, Mapping[str, str]]
) -> cycle.Cycle:
    """What this subset cost, from the last one on."""
    return cycle.since_last(
        context.instance,
        selection.key(NAME),
        selection.key(attention_embeddings.NAME),
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
    content = hashlib.sha256()
    for part in chosen.iter_slices(100_000):  # as text, a row takes some hundred bytes
        content.update(part.write_ndjson().encode())
    return digest(content.hexdigest())


class PoolScores:
    """The scores of all shards, read shard by shard and never held.

    Attributes:
        n: Number of scores, known after ``top``, like the sums.
        leverage_sum: Of all scores.
        normalised_sum: Of all normalised scores.
    """

    def __init__(self, artifacts: ArtifactStore, plan: ScorePlan, shards: Sequence[str]) -> None:
        """The scores of ``shards``, which are to be of the bases that ``plan`` says."""
        self._artifacts, self._plan, self._shards = artifacts, plan, shards
        self.n, self.leverage_sum, self.normalised_sum = 0, 0.0, 0.0

    def top(self, size: int) -> pl.DataFrame:
        """The ``size`` rows of highest normalised leverage, in order; memory of these rows and one shard.

        Raises:
            dg.Failure: A shard was scored with another basis than the plan says.
        """
        threshold = nth_largest(self._normalised, size)
        self.n, self.leverage_sum, self.normalised_sum = threshold.n, 0.0, 0.0
        above, tied = [self._none()], self._none()
        for shard, scores in self._frames():
            self.leverage_sum += float(scores["leverage"].sum())
            self.normalised_sum += float(scores["normalised_leverage"].sum())
            rows = scores.with_columns(shard=pl.lit(shard)).select(self._none().columns)
            above.append(rows.filter(pl.col("normalised_leverage") > threshold.value))
            at = rows.filter(pl.col("normalised_leverage") == threshold.value)
            if at.height:
                # A sample that two shards repeat has one key; the shard makes the order total.
                tied = pl.concat([tied, at]).sort(["sample_key", "shard"]).head(threshold.n_ties_taken)
        return (
            pl.concat([*above, tied])
            .sort(["normalised_leverage", "sample_key", "shard"], descending=[True, False, False])
            .with_row_index("rank", offset=1)
            .cast(polars_schema(SELECTED_SUBSET))
            .select(polars_schema(SELECTED_SUBSET).names())
        )

    def _normalised(self) -> Iterator[NDArray[np.float64]]:
        for _, scores in self._frames(["normalised_leverage"]):
            yield scores["normalised_leverage"].to_numpy()

    def _frames(self, columns: list[str] | None = None) -> Iterator[tuple[str, pl.DataFrame]]:
        for shard in self._shards:
            scores, header = self._artifacts.read_frame(importance_scores.NAME, shard, columns=columns)
            if header["subspace_basis"] != (wanted := self._plan.of_shard(shard)):
                raise dg.Failure(
                    f"shard {shard!r} was scored with basis {header['subspace_basis']}, it is to be scored "
                    f"with {wanted}; scores of any other basis cannot be compared: materialize "
                    f"importance_scores[{shard}] again",
                    allow_retries=False,
                )
            yield shard, scores

    @staticmethod
    def _none() -> pl.DataFrame:
        schema = polars_schema(SELECTED_SUBSET)
        return pl.DataFrame(schema={name: dtype for name, dtype in schema.items() if name != "rank"})
