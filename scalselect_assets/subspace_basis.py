"""Step 4, all shards: the directions that hold the energy threshold of the centred embeddings.

Holds: mean, the k kept directions with their singular values, the whole spectrum, and which version of which
shard went in. Costs: d² values per shard, one eigendecomposition of a d × d matrix (d³).
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg

from resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from resources.storage import StorageResource
from resources.vlm import VlmResource
from scalselect_assets import attention_embeddings, embedding_moments, lineage
from scalselect_assets.partitions import missing_shards_check, pool_shards
from scalselect_assets.selection import Selection
from scalselect_assets.tables import SPECTRUM, column_schema

if TYPE_CHECKING:
    from scalselect_assets.method.moments import Moments
    from scalselect_assets.method.subspace import Subspace

NAME = "subspace_basis"
CODE_VERSION = "1"


def provenance(selection: Selection, moments_versions: Mapping[str, str]) -> str:
    """What the basis is computed from, which is also its version; the moments' versions cover the model."""
    return lineage.provenance(
        NAME, CODE_VERSION, energy=selection.energy, centred=True, embedding_moments=dict(moments_versions)
    )


def read_basis(artifacts: ArtifactStore) -> tuple["Subspace", dict[str, str]]:
    """The basis and its header.

    Raises:
        ArtifactMissingError: Not materialized.
    """
    from scalselect_assets.method.subspace import Subspace

    arrays, header = artifacts.read_arrays(NAME)
    return Subspace.from_arrays(arrays), header


def build(selection: Selection) -> dg.AssetsDefinition:
    """The asset for one selection."""

    @dg.asset(
        **selection.asset_options(NAME, by_shard=False),
        deps=[selection.key(embedding_moments.NAME), selection.key("shard_manifest")],
        kinds={"numpy"},
        code_version=CODE_VERSION,
        metadata={"dagster/column_schema": column_schema(SPECTRUM)},
        check_specs=[
            dg.AssetCheckSpec(
                "basis_covers_every_shard",
                asset=selection.key(NAME),
                description="Every shard of the pool is embedded and part of the basis.",
            )
        ],
    )
    def subspace_basis(
        context: dg.AssetExecutionContext, storage: StorageResource, vlm: VlmResource
    ) -> dg.MaterializeResult:
        """The directions that together hold the energy threshold of all embeddings, centred."""
        from scalselect_assets.method.subspace import fit_subspace

        start = time.monotonic()
        artifacts = storage.artifacts(selection.store)
        shards = pool_shards(context, selection.partitions)
        fingerprint = vlm.card(artifacts, **selection.target)["fingerprint"]
        inputs = moments_headers(artifacts, shards, fingerprint)
        moments = merged_moments(artifacts, inputs)
        subspace = fit_subspace(moments, selection.energy)
        version = provenance(selection, {shard: header["data_version"] for shard, header in inputs.items()})
        path, size = artifacts.write_arrays(
            NAME,
            subspace.to_arrays(),
            lineage.header(
                version,
                version,
                model_fingerprint=fingerprint,
                energy_threshold=repr(selection.energy),
                shards=json.dumps(inputs, sort_keys=True),
            ),
        )
        return lineage.result(
            version,
            version,
            {
                "rank": subspace.k,
                "numerical_rank": subspace.rank,
                "energy": subspace.energy,
                "samples": subspace.n,
                "shards": len(inputs),
                "dimension": moments.d,
                "spectrum": dg.MetadataValue.table(_spectrum_head(subspace), schema=column_schema(SPECTRUM)),
                "seconds": time.monotonic() - start,
                "bytes": size,
                "dagster/uri": str(path),
            },
            [
                missing_shards_check(
                    "basis_covers_every_shard", [shard for shard in shards if shard not in inputs]
                )
            ],
        )

    return subspace_basis


def moments_headers(
    artifacts: ArtifactStore, shards: Sequence[str], fingerprint: str
) -> dict[str, dict[str, str]]:
    """The headers of the moments that belong into a basis, by shard.

    A shard is left out where it could not be embedded (again): it has no moments, or they are another
    model's or of other vectors than it has now. The caller reports it.
    """
    headers = {}
    for shard in shards:
        try:
            header = artifacts.read_header(embedding_moments.NAME, shard, suffix=".safetensors")
            _, embeddings = attention_embeddings.recorded_table(artifacts, shard)
        except (ArtifactMissingError, ArtifactCorruptError):
            continue
        if (header["model_fingerprint"], header["attention_embeddings"]) == (
            fingerprint,
            embeddings["data_version"],
        ):
            headers[shard] = header
    return headers


def merged_moments(artifacts: ArtifactStore, shards: Iterable[str]) -> "Moments":
    """The moments of all `shards` together.

    Raises:
        dg.Failure: No sample is embedded.
    """
    from scalselect_assets.method.moments import Moments

    total: Moments | None = None
    for shard in shards:
        moments = Moments.from_arrays(artifacts.read_arrays(embedding_moments.NAME, shard)[0])
        total = moments if total is None else total.merge(moments)
    if total is None or total.n == 0:
        raise dg.Failure(
            "no sample of the pool is embedded, so there is nothing to select from; the rejected_rows files "
            "and the failed shards' runs say why",
            allow_retries=False,
        )
    return total


def _spectrum_head(subspace: "Subspace", n_directions: int = 20) -> list[dg.TableRecord]:
    """The strongest directions, for the UI."""
    rows: list[dict[str, Any]] = [
        {
            "direction": index + 1,
            "singular_value": float(value) ** 0.5,
            "energy": float(energy),
            "kept": index < subspace.k,
        }
        for index, (value, energy) in enumerate(
            zip(subspace.spectrum[:n_directions], subspace.energy_curve()[:n_directions], strict=True)
        )
    ]
    return [dg.TableRecord(row) for row in rows]
