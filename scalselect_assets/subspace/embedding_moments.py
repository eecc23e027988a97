"""Step 3, by shard: what the basis needs to know of the shard's vectors, and no more.

Holds: the number of vectors, their mean and their scatter matrix in float64, which merge over shards. Costs:
one pass over the shard's vectors, n·d²/2 multiplications, d(d + 1)/2 values of 8 bytes (67 MB at d = 4096).
"""

import hashlib
import time

import dagster as dg

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts
from scalselect_assets.recording import data_versions
from scalselect_assets.recording.columns import MOMENTS, column_schema
from scalselect_assets.recording.materialization import Output, materialize_shards
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource
from scalselect_assets.subspace import pool_moments

NAME = pool_moments.SHARD_MOMENTS
CODE_VERSION = "2"


def provenance(selection: Selection, embeddings_version: str) -> str:
    """What the moments of one shard are computed from."""
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
        from scalselect_assets.method.subspace.moments import MomentsAccumulator
        from scalselect_assets.method.subspace.preprocessing import prepared_rows

        artifacts, embeddings = storage.artifacts(selection.store), storage.embeddings(selection.store)

        def accumulate(shard: str) -> Output:
            start = time.monotonic()
            table, embedded = receipts.recorded_table(artifacts, shard)
            accumulator = MomentsAccumulator(table.dimension, device=vlm.array_device())
            for batch in embeddings.read(table):
                x = prepared_rows(batch.vector, to_unit_length=selection.unit_rows)
                accumulator.add(x, names=batch.sample_key)
            moments = accumulator.moments()
            content = hashlib.sha256()
            for _, array in sorted((arrays := moments.to_arrays()).items()):
                content.update(array.tobytes())
            # The vectors' version is part of it: other rows with the same moments still need new scores.
            data_version = digest(content.hexdigest(), embedded["data_version"])
            made_from = provenance(selection, embedded["data_version"])
            pool_moments.retire(artifacts, shard, data_version)
            header = data_versions.header(
                data_version,
                made_from,
                attention_embeddings=embedded["data_version"],
                model_fingerprint=table.fingerprint,
                rows=str(moments.n),
                lance_table=table.table,
                lance_version=str(table.version),
            )
            path, size = artifacts.write_arrays(NAME, arrays, header, shard)
            return Output(
                data_version,
                made_from,
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

        return materialize_shards(context, storage.locks(selection.store), accumulate)

    return embedding_moments
