"""Step 5, by shard: the leverage score of each sample in the subspace of the whole pool.

Holds: one row per embedded sample and, in the header, the version of the basis. A run may cover a range of
shards. Costs: one pass over the shard's vectors, n·d·k multiplications, one batch in memory.
"""

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import dagster as dg
import polars as pl

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts
from scalselect_assets.recording import data_versions
from scalselect_assets.recording.columns import IMPORTANCE_SCORES, column_schema, polars_schema
from scalselect_assets.recording.materialization import Output, materialize_shards
from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource
from scalselect_assets.subspace import subspace_basis

if TYPE_CHECKING:
    from scalselect_assets.method.subspace.leverage import LeverageScorer

NAME = "importance_scores"
CODE_VERSION = "2"


def provenance(basis_version: str) -> str:
    """What the scores of a shard are computed from; the basis version covers the vectors of every shard."""
    return data_versions.provenance(NAME, CODE_VERSION, subspace_basis=basis_version)


def pool_version(basis_version: str) -> str:
    """The version of the scores of all shards together.

    The empty mapping carries no information. It is part of the hashes that stores hold, and without it every
    stored choice would count as stale.
    """
    return digest(basis_version, {})


def read_scores(
    artifacts: ArtifactStore, basis_version: str, shard: str, columns: list[str] | None = None
) -> pl.DataFrame:
    """The scores of a shard under a basis, in row order.

    Raises:
        ArtifactMissingError: The shard is not scored.
        ArtifactCorruptError: The file is damaged.
        dg.Failure: The shard was scored with another basis.
    """
    scores, header = artifacts.read_frame(NAME, shard, columns=columns)
    if header["subspace_basis"] != basis_version:
        raise dg.Failure(
            f"shard {shard!r} was scored with basis {header['subspace_basis']}, and the present one is "
            f"{basis_version}; scores of different bases cannot be compared: materialize {NAME}[{shard}] "
            "again",
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
        deps=[selection.key(receipts.NAME), selection.key(subspace_basis.NAME)],
        kinds={"numpy", "parquet"},
        code_version=CODE_VERSION,
        metadata={"dagster/column_schema": column_schema(IMPORTANCE_SCORES)},
    )
    def importance_scores(
        context: dg.AssetExecutionContext, storage: StorageResource, vlm: VlmResource
    ) -> dg.MaterializeResult:
        """The rank-k leverage score of each sample: how much the dominant subspace rests on it."""
        from scalselect_assets.method.subspace.leverage import LeverageScorer

        artifacts = storage.artifacts(selection.store)
        subspace, basis = subspace_basis.read_basis(artifacts)
        basis_version, fitted_on = basis["data_version"], json.loads(basis["shards"])
        scorer = LeverageScorer(subspace, device=vlm.array_device())
        made_from = provenance(basis_version)

        def score(shard: str) -> Output:
            start = time.monotonic()
            frame = _score(storage, selection, shard, scorer, fitted_on)
            header = data_versions.header(made_from, made_from, subspace_basis=basis_version)
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
    from scalselect_assets.method.subspace.preprocessing import prepared_rows

    table, _ = receipts.fitted_table(storage.artifacts(selection.store), shard, fitted_on)
    frames = []
    for batch in storage.embeddings(selection.store).read(table):
        x = prepared_rows(batch.vector, to_unit_length=selection.unit_rows)
        leverage = scorer.scores(x, names=batch.sample_key)
        columns = {
            "row": batch.row,
            "sample_key": batch.sample_key,
            "source_id": batch.source_id,
            "leverage": leverage,
            "normalised_leverage": leverage * scorer.normalisation,
        }
        frames.append(pl.DataFrame(columns, schema=polars_schema(IMPORTANCE_SCORES)))
    return pl.concat([pl.DataFrame(schema=polars_schema(IMPORTANCE_SCORES)), *frames]).sort("row")
