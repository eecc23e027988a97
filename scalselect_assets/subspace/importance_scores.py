"""Step 5, by shard: the leverage score of each sample in the subspace of the whole pool.

Holds: one row per embedded sample and, in the header, the version of the basis. A run may cover a range of
shards. Costs: one pass over the shard's vectors, n·d·k multiplications, one batch in memory.
"""

import time

import dagster as dg
import polars as pl

from scalselect_assets.asset_path import OutputHeader, ShardAsset, StoreState
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts
from scalselect_assets.recording import data_versions
from scalselect_assets.recording.columns import IMPORTANCE_SCORES, column_schema, polars_schema
from scalselect_assets.recording.materialization import Output, materialize_shards
from scalselect_assets.resources.artifacts import FRAME, ArtifactStore
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource
from scalselect_assets.subspace import subspace_basis

NAME = "importance_scores"
CODE_VERSION = "3"


def provenance(basis_version: str) -> str:
    """The hash of all inputs of a shard's scores. The basis version covers the vectors of every shard."""
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
    """The percentage of the other rows that rank lower: 100 at rank 1 and 0 at rank ``n``."""
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
        scoring = _Scoring(selection, storage, vlm)
        # Scoring reads one fixed version of the vectors, so it can run while the next version is embedded.
        return materialize_shards(context, storage.locks(selection.store), scoring.make, work=NAME)

    return importance_scores


class _Scoring:
    """Scores shards with the basis that the store holds."""

    def __init__(self, selection: Selection, storage: StorageResource, vlm: VlmResource) -> None:
        from scalselect_assets.method.subspace.leverage import LeverageScorer

        self._selection = selection
        self._artifacts, self._tables = (
            storage.artifacts(selection.store),
            storage.embeddings(selection.store),
        )
        subspace, self._basis = subspace_basis.read_basis(self._artifacts)
        self._scorer = LeverageScorer(subspace, device=vlm.array_device())

    def make(self, shard: str) -> Output:
        """Score a shard and write its scores.

        Raises:
            dg.Failure: The basis was not fitted on the shard's present vectors.
        """
        start = time.monotonic()
        frame = self._scores(shard)
        version = self._basis.data_version
        made_from = provenance(version)  # the basis covers the vectors, so nothing else comes in
        stated = data_versions.header(made_from, made_from, subspace_basis=version)
        path, size = self._artifacts.write_frame(NAME, frame, stated, shard)
        return Output(
            made_from,
            made_from,
            {
                "dagster/partition_row_count": frame.height,
                "leverage_sum": float(frame["leverage"].sum()),
                "leverage_max": float(frame["leverage"].max() or 0.0),  # type: ignore[arg-type]
                "basis_version": version,
                "seconds": time.monotonic() - start,
                "bytes": size,
                "dagster/uri": str(path),
            },
        )

    def _scores(self, shard: str) -> pl.DataFrame:
        """The scores of one shard, in row order."""
        from scalselect_assets.method.subspace.leverage import ranked
        from scalselect_assets.method.subspace.preprocessing import prepared_rows

        table, _ = receipts.fitted_table(self._artifacts, shard, self._basis.vectors_of(shard))
        schema = polars_schema(IMPORTANCE_SCORES)
        frames = [pl.DataFrame(schema=schema)]
        for batch in self._tables.read(table):
            x = prepared_rows(batch.vector, to_unit_length=self._selection.unit_rows)
            leverage = self._scorer.scores(x, names=batch.sample_key)
            columns = {
                "row": batch.row,
                "sample_key": batch.sample_key,
                "source_id": batch.source_id,
                "leverage": leverage,
                "normalised_leverage": ranked(leverage * self._scorer.normalisation),
            }
            frames.append(pl.DataFrame(columns, schema=schema))
        return pl.concat(frames).sort("row")


def expected(state: StoreState, shard: str) -> str | None:
    """The provenance that a shard's scores would have now; None if the basis was fitted without the shard."""
    if shard not in state.once(subspace_basis.inputs):
        return None
    return provenance(state.version(subspace_basis.ASSET))


def header(state: StoreState, shard: str) -> OutputHeader:
    """The header of a shard's scores; empty where they are missing or damaged."""
    return state.frame_header(NAME, shard)


ASSET = ShardAsset(
    name=NAME,
    code_version=CODE_VERSION,
    build=build,
    expected=expected,
    header=header,
    shard_files=((NAME, FRAME),),
)
