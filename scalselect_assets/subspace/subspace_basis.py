"""Step 4, all shards: the directions that the rank rule keeps of the centred embeddings.

Holds: mean, the k kept directions with their singular values, the whole spectrum, which version of which
shard went in, and how far the basis has moved (`basis_history`). Costs: d² values and d²
operations per changed shard, one eigendecomposition of a d × d matrix (d³), and a bounded sample of vectors.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field, ValidationError

from scalselect_assets.asset_path import OutputHeader, PoolAsset, StoreState
from scalselect_assets.charts import in_dagster
from scalselect_assets.declaration.selection import RETIRED_SETTINGS, Selection
from scalselect_assets.recording import data_versions
from scalselect_assets.recording.columns import SPECTRUM, column_schema
from scalselect_assets.recording.materialization import Output, at_work
from scalselect_assets.recording.partitions import missing_shards_check
from scalselect_assets.recording.records import Records
from scalselect_assets.resources.artifacts import (
    ARRAYS,
    ArtifactCorruptError,
    ArtifactMissingError,
    ArtifactStore,
)
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource
from scalselect_assets.subspace import basis_history, embedding_moments, pool_moments
from scalselect_assets.subspace.basis_header import (
    BASIS,
    BasisHeader,
    MomentsHeader,
    moments_header,
    parse_basis_header,
    read_basis_header,
)

if TYPE_CHECKING:
    from scalselect_assets.method.subspace.basis import Subspace

from scalselect_assets.embedding import receipts
from scalselect_assets.subspace.rank_alternatives import rank_alternatives, rule_in_words

NAME = BASIS
CODE_VERSION = "2"


class BasisConfig(dg.Config):
    """The way in which the basis is computed. The result is the same either way."""

    rebuild: bool = Field(
        default=False,
        description="Add up the moments of all shards anew instead of updating the stored totals.",
    )


def version(selection: Selection, moments_versions: Mapping[str, str]) -> str:
    """The hash of all that determines the basis. The moments' versions cover the model."""
    return digest(
        NAME,
        CODE_VERSION,
        selection.rank_rule.describe(),
        {"centred": True, "standardise": selection.standardise, "unit_rows": selection.unit_rows},
        dict(moments_versions),
    )


def provenance(selection: Selection, moments_versions: Mapping[str, str]) -> str:
    """The hash of all inputs of the asset, which determine the basis."""
    return data_versions.provenance(
        NAME, CODE_VERSION, basis=version(selection, moments_versions), **RETIRED_SETTINGS
    )


def _shown_code_version(selection: Selection) -> str:
    return data_versions.shown_code_version(
        CODE_VERSION,
        rank_rule=selection.rank_rule.describe(),
        standardise=selection.standardise,
        unit_rows=selection.unit_rows,
        **RETIRED_SETTINGS,
    )


def read_basis(artifacts: ArtifactStore) -> tuple["Subspace", BasisHeader]:
    """The basis and its header.

    Raises:
        ArtifactMissingError: There is no basis yet.
        ArtifactCorruptError: It is damaged.
    """
    from scalselect_assets.method.subspace.basis import Subspace

    arrays, header = artifacts.read_arrays(NAME)
    return Subspace.from_arrays(arrays), parse_basis_header(artifacts, header)


def build(selection: Selection) -> dg.AssetsDefinition:
    """The asset for one selection."""

    @dg.asset(
        **selection.asset_options(NAME, by_shard=False),
        deps=[selection.key(name) for name in (embedding_moments.NAME, receipts.NAME, "shard_manifest")],
        kinds={"numpy", "scipy"},
        code_version=_shown_code_version(selection),
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
        context: dg.AssetExecutionContext, config: BasisConfig, storage: StorageResource, vlm: VlmResource
    ) -> dg.MaterializeResult:
        """The directions of all embeddings, centred, that the rank rule keeps."""
        with at_work(context, storage.locks(selection.store)):
            shards = sorted(Records(context.instance).known_shards(selection.name))
            return fit_basis(selection, storage, vlm, shards, rebuild=config.rebuild).result()

    return subspace_basis


def fit_basis(
    selection: Selection, storage: StorageResource, vlm: VlmResource, shards: Sequence[str], *, rebuild: bool
) -> Output:
    """Fit the basis of a pool and write it.

    Args:
        selection: The selection that the basis belongs to.
        storage: Opens the store.
        vlm: Gives the fingerprint of the target model.
        shards: All shards of the pool; those without moments are left out, and the check names them.
        rebuild: Whether to add up the moments of all shards anew instead of updating the stored totals.

    Raises:
        dg.Failure: No sample is embedded, or a shard of the last basis lacks the moments of its vectors.
    """
    from scalselect_assets.method.subspace.basis import principal_axes

    start = time.monotonic()
    artifacts = storage.artifacts(selection.store)
    fingerprint = vlm.card(artifacts, **selection.target)["fingerprint"]
    found = moments_headers(selection, artifacts, shards, fingerprint)
    _require_moments(artifacts, shards, found, fingerprint)
    versions = {shard: moments.data_version for shard, moments in found.items()}
    pool = pool_moments.update(artifacts, versions, rebuild=rebuild)
    if pool is None or pool.moments.n == 0:
        raise dg.Failure(
            "no sample of the pool is embedded, so there is nothing to select from; the "
            "rejected_rows files and the failed shards' runs say why",
            allow_retries=False,
        )
    axes = principal_axes(pool.moments, standardise=selection.standardise)
    k = selection.rank_rule.rank(axes.spectrum, axes.n, axes.d)
    subspace = axes.subspace(k)
    stated = BasisHeader.model_construct(
        data_version=digest(version(selection, versions), _arrays_hash(subspace.to_arrays())),
        provenance=provenance(selection, versions),
        model_fingerprint=fingerprint,
        rank_rule=selection.rank_rule.describe(),
        standardise=selection.standardise,
        unit_rows=selection.unit_rows,
        shards=found,
        drift={},
    )
    alternatives = rank_alternatives(storage, selection, axes, k, list(found))
    drift = basis_history.drift_since_last(artifacts, subspace, pool.moments, stated)
    stated = stated.model_copy(update={"drift": drift})
    path, size = artifacts.write_arrays(NAME, subspace.to_arrays(), stated.to_header())
    missing = [shard for shard in shards if shard not in found]
    return Output(
        stated.data_version,
        stated.provenance,
        {
            "shards": len(found),
            **_numbers(subspace, pool),
            **{f"drift_{name}": value for name, value in drift.items()},
            "energy_curve": in_dagster.energy_curve(subspace, rule_in_words(stated.rank_rule)),
            "rank_alternatives": alternatives,
            "spectrum": dg.MetadataValue.table(_spectrum_head(subspace), schema=column_schema(SPECTRUM)),
            "seconds": time.monotonic() - start,
            "bytes": size,
            "dagster/uri": str(path),
        },
        (missing_shards_check("basis_covers_every_shard", missing),),
    )


def _arrays_hash(arrays: Mapping[str, Any]) -> str:
    """The hash of the arrays of the basis. A repaired basis thus has another version than the damaged one."""
    content = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        content.update(f"{name} {array.dtype} {array.shape} ".encode())
        content.update(array.tobytes())
    return content.hexdigest()


def _numbers(subspace: "Subspace", pool: pool_moments.PoolMoments) -> dict[str, Any]:
    """Numbers of the basis and of the moments that it was fitted on, for the UI to plot over time."""
    return {
        "rank": subspace.k,
        "numerical_rank": subspace.rank,
        "energy": subspace.energy,
        "samples": subspace.n,
        "dimension": subspace.d,
        "moments_read": pool.n_read,
        "rebuilt": pool.rebuilt,
        "shards_added": len(pool.added),
        "shards_removed": len(pool.removed),
    }


def moments_headers(
    selection: Selection, artifacts: ArtifactStore, shards: Sequence[str], fingerprint: str
) -> dict[str, MomentsHeader]:
    """The headers of the moments that belong into a basis, by shard.

    A shard is left out if it has no current moments: it has none at all, or they belong to another model, to
    other vectors than it has now, or to vectors with other preprocessing. The caller reports such a shard.
    """
    headers = {}
    for shard in shards:
        try:
            stated = moments_header(artifacts.read_header(embedding_moments.NAME, shard, suffix=ARRAYS))
            _, embeddings = receipts.recorded_table(artifacts, shard)
        except (ArtifactMissingError, ArtifactCorruptError, ValidationError):
            continue
        wanted = embedding_moments.provenance(selection, embeddings["data_version"])
        if (stated.model_fingerprint, stated.provenance) == (fingerprint, wanted):
            headers[shard] = stated
    return headers


def _require_moments(
    artifacts: ArtifactStore, shards: Sequence[str], found: Mapping[str, MomentsHeader], fingerprint: str
) -> None:
    """Refuse to drop a shard from the selection because its moments are missing after a fault.

    Raises:
        dg.Failure: A shard of the last basis has vectors of the present model, but not their moments.
    """
    try:
        last = read_basis_header(artifacts).shards
    except (ArtifactMissingError, ArtifactCorruptError):
        return
    behind = [
        shard
        for shard in shards
        if shard in last and shard not in found and _model_of(artifacts, shard) == fingerprint
    ]
    if behind:
        raise dg.Failure(
            f"{embedding_moments.NAME} of {', '.join(behind)} are not those of the present vectors, so the "
            "selection stays as it was; materialize them, or run the refresh again",
            allow_retries=False,
        )


def _model_of(artifacts: ArtifactStore, shard: str) -> str | None:
    """Fingerprint of the model that made a shard's vectors; none where it has none."""
    try:
        return receipts.recorded_table(artifacts, shard)[0].fingerprint
    except (ArtifactMissingError, ArtifactCorruptError):
        return None


def _spectrum_head(subspace: "Subspace", n_directions: int = 20) -> list[dg.TableRecord]:
    """The strongest directions, for the UI."""
    rows: list[dict[str, Any]] = [
        {
            "direction": index + 1,
            "singular_value": float(f"{value**0.5:.6g}"),
            "energy": round(float(energy), 4),
            "kept": index < subspace.k,
        }
        for index, (value, energy) in enumerate(
            zip(subspace.spectrum[:n_directions], subspace.energy_curve()[:n_directions], strict=True)
        )
    ]
    return [dg.TableRecord(row) for row in rows]


def inputs(state: StoreState) -> dict[str, MomentsHeader]:
    """The headers of the moments that belong into the basis now, by shard."""
    return moments_headers(state.selection, state.artifacts, state.shards, state.model_fingerprint())


def expected(state: StoreState) -> str:
    """The provenance that the basis would have now."""
    versions = {shard: moments.data_version for shard, moments in state.once(inputs).items()}
    return provenance(state.selection, versions)


def header(state: StoreState) -> OutputHeader:
    """The header of the basis; empty where it is missing or damaged."""
    return state.arrays_header(NAME)


ASSET = PoolAsset(name=NAME, code_version=CODE_VERSION, build=build, expected=expected, header=header)
