"""Step 3, by shard: the moments of the shard's vectors, from which the basis is computed.

Holds: the number of vectors, their mean and their scatter matrix in float64, which merge over shards. Costs:
one pass over the shard's vectors, n·d²/2 multiplications, d(d + 1)/2 values of 8 bytes (67 MB at d = 4096).
"""

import hashlib
import time

import dagster as dg

from scalselect_assets.asset_path import OutputHeader, ShardAsset, StoreState
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import attention_embeddings, receipts
from scalselect_assets.recording import data_versions
from scalselect_assets.recording.columns import MOMENTS, column_schema
from scalselect_assets.recording.materialization import Output, materialize_shards
from scalselect_assets.resources.artifacts import ARRAYS
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource
from scalselect_assets.subspace import pool_moments
from scalselect_assets.subspace.basis_header import MomentsHeader

NAME = pool_moments.SHARD_MOMENTS
CODE_VERSION = "2"


def provenance(selection: Selection, embeddings_version: str) -> str:
    """The hash of all inputs of one shard's moments."""
    return data_versions.provenance(
        NAME, CODE_VERSION, unit_rows=selection.unit_rows, attention_embeddings=embeddings_version
    )


def build(selection: Selection) -> dg.AssetsDefinition:
    """The asset for one selection."""

    @dg.asset(
        **selection.asset_options(NAME, by_shard=True),
        deps=[selection.key(receipts.NAME)],
        kinds={"numpy"},
        code_version=data_versions.shown_code_version(CODE_VERSION, unit_rows=selection.unit_rows),
        metadata={"dagster/column_schema": column_schema(MOMENTS)},
    )
    def embedding_moments(
        context: dg.AssetExecutionContext, storage: StorageResource, vlm: VlmResource
    ) -> dg.MaterializeResult:
        """Count, mean and scatter matrix of the shard's vectors, accumulated in float64."""

        def make(shard: str) -> Output:
            return sum_up(selection, storage, vlm, shard)

        return materialize_shards(context, storage.locks(selection.store), make)

    return embedding_moments


def sum_up(selection: Selection, storage: StorageResource, vlm: VlmResource, shard: str) -> Output:
    """Accumulate the moments of a shard's vectors and write them."""
    from scalselect_assets.method.subspace.moments import MomentsAccumulator
    from scalselect_assets.method.subspace.preprocessing import prepared_rows

    start = time.monotonic()
    artifacts, embeddings = storage.artifacts(selection.store), storage.embeddings(selection.store)
    table, embedded = receipts.recorded_table(artifacts, shard)
    accumulator = MomentsAccumulator(table.dimension, device=vlm.array_device())
    for batch in embeddings.read(table):
        x = prepared_rows(batch.vector, to_unit_length=selection.unit_rows)
        accumulator.add(x, names=batch.sample_key)
    moments = accumulator.moments()
    content = hashlib.sha256()
    for _, array in sorted((arrays := moments.to_arrays()).items()):
        content.update(array.tobytes())
    stated = MomentsHeader(
        # The version covers that of the vectors: other rows with the same moments still need new scores.
        data_version=digest(content.hexdigest(), embedded["data_version"]),
        provenance=provenance(selection, embedded["data_version"]),
        attention_embeddings=embedded["data_version"],
        model_fingerprint=table.fingerprint,
        rows=moments.n,
        lance_table=table.table,
        lance_version=table.version,
    )
    pool_moments.retire(artifacts, shard, stated.data_version)
    path, size = artifacts.write_arrays(NAME, arrays, stated.to_header(), shard)
    return Output(
        stated.data_version,
        stated.provenance,
        {
            "dagster/partition_row_count": moments.n,
            "dimension": moments.d,
            "seconds": time.monotonic() - start,
            "bytes": size,
            "dagster/uri": str(path),
            "lance_table": table.table,
            "lance_version": table.version,
        },
    )


def expected(state: StoreState, shard: str) -> str | None:
    """The provenance that a shard's moments would have now."""
    return provenance(state.selection, state.version(attention_embeddings.ASSET, shard))


def header(state: StoreState, shard: str) -> OutputHeader:
    """The header of a shard's moments; empty where they are missing or damaged."""
    return state.arrays_header(NAME, shard)


ASSET = ShardAsset(
    name=NAME,
    code_version=CODE_VERSION,
    build=build,
    expected=expected,
    header=header,
    shard_files=((NAME, ARRAYS),),
)
