"""Step 5, by shard: the leverage score of each sample in the subspace of the whole pool.

Holds: one row per embedded sample and, in the header, the version of the basis. A run may cover a range of
shards. Costs: one pass over the shard's vectors, n·d·k multiplications, one batch in memory.
"""

import json
import time
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

import dagster as dg
import polars as pl

from resources.artifacts import ArtifactStore
from resources.storage import StorageResource
from resources.vlm import VlmResource
from scalselect_assets import attention_embeddings, lineage, subspace_basis
from scalselect_assets.basis_history import ScorePlan, read_scoring_basis
from scalselect_assets.materialization import Output, materialize_shards
from scalselect_assets.selection import Selection
from scalselect_assets.tables import IMPORTANCE_SCORES, column_schema, polars_schema

if TYPE_CHECKING:
    from scalselect_assets.method.leverage import LeverageScorer

NAME = "importance_scores"
CODE_VERSION = "3"


def provenance(basis_version: str) -> str:
    """What the scores of a shard are computed from; the basis version covers the vectors of every shard."""
    return lineage.provenance(NAME, CODE_VERSION, subspace_basis=basis_version)


def read_scores(
    artifacts: ArtifactStore, plan: ScorePlan, shard: str, columns: list[str] | None = None
) -> pl.DataFrame:
    """The scores of a shard, in row order.

    Raises:
        ArtifactMissingError: The shard is not scored.
        ArtifactCorruptError: The file is damaged.
        dg.Failure: The shard was scored with another basis than the plan says.
    """
    scores, header = artifacts.read_frame(NAME, shard, columns=columns)
    if header["subspace_basis"] != (wanted := plan.of_shard(shard)):
        raise dg.Failure(
            f"shard {shard!r} was scored with basis {header['subspace_basis']}, it is to be scored with "
            f"{wanted}; scores of any other basis cannot be compared: materialize {NAME}[{shard}] again",
            allow_retries=False,
        )
    return scores


def percentile(rank: int, n: int) -> float:
    """How many percent of the others rank below: 100 for the first of ``n``, rank 1, and 0 for the last."""
    return 100 * (n - rank) / (n - 1) if n > 1 else 100.0


def build(selection: Selection) -> dg.AssetsDefinition:
    """The asset for one selection."""

    @dg.asset(
        **selection.asset_options(NAME, by_shard=True),
        deps=[selection.key(attention_embeddings.NAME), selection.key(subspace_basis.NAME)],
        kinds={"numpy", "parquet"},
        code_version=CODE_VERSION,
        metadata={"dagster/column_schema": column_schema(IMPORTANCE_SCORES)},
    )
    def importance_scores(
        context: dg.AssetExecutionContext, storage: StorageResource, vlm: VlmResource
    ) -> dg.MaterializeResult:
        """The rank-k leverage score of each sample: how much the dominant subspace rests on it."""
        from scalselect_assets.method.leverage import LeverageScorer

        artifacts = storage.artifacts(selection.store)
        basis = artifacts.read_header(subspace_basis.NAME, suffix=".safetensors")
        plan, fitted_on = ScorePlan.from_header(basis), json.loads(basis["shards"])

        @cache
        def scorer(basis_version: str) -> LeverageScorer:
            subspace = read_scoring_basis(artifacts, plan, basis_version)
            return LeverageScorer(subspace, device=vlm.array_device())

        def score(shard: str) -> Output:
            start, basis_version = time.monotonic(), plan.of_shard(shard)
            frame = _score(storage, selection, shard, scorer(basis_version), fitted_on)
            made_from = provenance(basis_version)  # the basis covers the vectors, so nothing else comes in
            header = lineage.header(made_from, made_from, subspace_basis=basis_version)
            path, size = artifacts.write_frame(NAME, frame, header, shard)
            return Output(
                made_from,
                made_from,
                {
                    "dagster/partition_row_count": frame.height,
                    "leverage_sum": float(frame["leverage"].sum()),
                    "leverage_max": float(frame["leverage"].max() or 0.0),  # type: ignore[arg-type]
                    "basis_version": basis_version,
                    "seconds": time.monotonic() - start,
                    "bytes": size,
                    "dagster/uri": str(path),
                },
            )

        # Scoring reads a version of the vectors, so it need not wait for whoever embeds the next one.
        return materialize_shards(context, storage.locks(selection.store), score, work=NAME)

    return importance_scores


def _score(
    storage: StorageResource,
    selection: Selection,
    shard: str,
    scorer: "LeverageScorer",
    fitted_on: Mapping[str, Mapping[str, str]],
) -> pl.DataFrame:
    """Scores of one shard, in row order.

    Raises:
        dg.Failure: The basis was not fitted on the shard's present vectors.
    """
    from scalselect_assets.method.leverage import ranked
    from scalselect_assets.method.preprocessing import prepared_rows

    table, _ = attention_embeddings.fitted_table(storage.artifacts(selection.store), shard, fitted_on)
    frames = []
    for batch in storage.embeddings(selection.store).read(table):
        x = prepared_rows(batch.vector, to_unit_length=selection.unit_rows)
        leverage = scorer.scores(x, names=batch.sample_key)
        columns = {
            "row": batch.row,
            "sample_key": batch.sample_key,
            "source_id": batch.source_id,
            "leverage": leverage,
            "normalised_leverage": ranked(leverage * scorer.normalisation),
        }
        frames.append(pl.DataFrame(columns, schema=polars_schema(IMPORTANCE_SCORES)))
    return pl.concat([pl.DataFrame(schema=polars_schema(IMPORTANCE_SCORES)), *frames]).sort("row")
