"""Step 4, all shards: the directions that the rank rule keeps of the centred embeddings.

Holds: mean, the k kept directions with their singular values, the whole spectrum, which version of which
shard went in, and how far the basis has moved (`basis_history`). Costs: d² values and d²
operations per changed shard, one eigendecomposition of a d × d matrix (d³), and a bounded sample of vectors.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from resources.embedding_store import EmbeddingTable
from resources.identity import digest
from resources.storage import StorageResource
from resources.vlm import VlmResource
from scalselect_assets import (
    attention_embeddings,
    basis_history,
    embedding_moments,
    lineage,
    plots,
    pool_moments,
)
from scalselect_assets.materialization import Output, at_work
from scalselect_assets.method.interrupts import deferred
from scalselect_assets.method.selection import budget_size
from scalselect_assets.partitions import missing_shards_check, pool_shards
from scalselect_assets.selection import RETIRED_SETTINGS, Selection
from scalselect_assets.tables import RANK_ALTERNATIVES, SPECTRUM, column_schema

if TYPE_CHECKING:
    from scalselect_assets.method.subspace import PrincipalAxes, Subspace

NAME = basis_history.BASIS
CODE_VERSION = "2"

REBUILD_TOLERANCE = 1e-9

# Comparing ranks reads at most this many vectors, of at most so many shards, and projects them on at most so
# many directions: some seconds at d = 4096.
_SAMPLE_ROWS = 8192
_SAMPLE_SHARDS = 64
_COMPARED_RANK = 1024


class BasisConfig(dg.Config):
    """How to come to the basis; what it is does not depend on it."""

    rebuild: bool = Field(
        default=False,
        description="Add up the moments of all shards anew instead of updating the stored totals.",
    )


def version(selection: Selection, moments_versions: Mapping[str, str]) -> str:
    """The basis version: the hash of all that determines the basis. The moments' versions cover the model."""
    return digest(
        NAME,
        CODE_VERSION,
        selection.rank_rule.describe(),
        {"centred": True, "standardise": selection.standardise, "unit_rows": selection.unit_rows},
        dict(moments_versions),
    )


def provenance(selection: Selection, moments_versions: Mapping[str, str]) -> str:
    """The hash of what the asset is computed from, which is all that determines the basis."""
    return lineage.provenance(
        NAME, CODE_VERSION, basis=version(selection, moments_versions), **RETIRED_SETTINGS
    )


def _shown_code_version(selection: Selection) -> str:
    return lineage.shown_code_version(
        CODE_VERSION,
        rank_rule=selection.rank_rule.describe(),
        standardise=selection.standardise,
        unit_rows=selection.unit_rows,
        **RETIRED_SETTINGS,
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
        deps=[
            selection.key(name)
            for name in (embedding_moments.NAME, attention_embeddings.NAME, "shard_manifest")
        ],
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
        from scalselect_assets.method.subspace import principal_axes

        with at_work(context, storage.locks(selection.store)):
            start = time.monotonic()
            artifacts = storage.artifacts(selection.store)
            shards = pool_shards(context, selection.partitions)
            fingerprint = vlm.card(artifacts, **selection.target)["fingerprint"]
            inputs = moments_headers(selection, artifacts, shards, fingerprint)
            _require_moments(artifacts, shards, inputs, fingerprint)
            versions = {shard: header["data_version"] for shard, header in inputs.items()}
            pool = pool_moments.update(artifacts, versions, rebuild=config.rebuild)
            if pool is None or pool.moments.n == 0:
                raise dg.Failure(
                    "no sample of the pool is embedded, so there is nothing to select from; the "
                    "rejected_rows files and the failed shards' runs say why",
                    allow_retries=False,
                )
            axes = principal_axes(pool.moments, standardise=selection.standardise)
            k = selection.rank_rule.rank(axes.spectrum, axes.n, axes.d)
            subspace = axes.subspace(k)
            alternatives = _rank_alternatives(storage, selection, axes, k, list(inputs))
            basis_version, made_from = version(selection, versions), provenance(selection, versions)
            header = lineage.header(
                basis_version,
                made_from,
                model_fingerprint=fingerprint,
                rank_rule=json.dumps(selection.rank_rule.describe()),
                standardise=json.dumps(selection.standardise),
                unit_rows=json.dumps(selection.unit_rows),
                shards=json.dumps(inputs, sort_keys=True),
            )
            drift = basis_history.drift_since_last(artifacts, subspace, pool.moments, header)
            path, size = artifacts.write_arrays(
                NAME, subspace.to_arrays(), {**header, "drift": json.dumps(drift)}
            )
            return Output(
                basis_version,
                made_from,
                {
                    "rank": subspace.k,
                    "numerical_rank": subspace.rank,
                    "energy": subspace.energy,
                    "samples": subspace.n,
                    "shards": len(inputs),
                    "dimension": subspace.d,
                    "moments_read": pool.n_read,
                    "rebuilt": pool.rebuilt,
                    "shards_added": len(pool.added),
                    "shards_removed": len(pool.removed),
                    **{f"drift_{name}": value for name, value in drift.items()},
                    "energy_curve": plots.energy_curve(subspace, rule_told(selection.rank_rule.describe())),
                    "rank_alternatives": alternatives,
                    "spectrum": dg.MetadataValue.table(
                        _spectrum_head(subspace), schema=column_schema(SPECTRUM)
                    ),
                    "seconds": time.monotonic() - start,
                    "bytes": size,
                    "dagster/uri": str(path),
                },
                (
                    missing_shards_check(
                        "basis_covers_every_shard", [shard for shard in shards if shard not in inputs]
                    ),
                ),
            ).result()

    return subspace_basis


def verify_job(selection: Selection) -> dg.JobDefinition:
    """The comparison with a rebuild, which reads every shard's moments; for when somebody asks.

    A job and not an asset check, since Dagster runs an asset's checks whenever it materializes the asset.
    """

    @dg.op(name=selection.job_name("verify_basis_op"), description="Compare the basis with its rebuild.")
    def verify_basis_op(context: dg.OpExecutionContext, storage: StorageResource) -> None:
        difference = rebuild_difference(storage.artifacts(selection.store))
        with deferred():
            context.log_event(dg.AssetObservation(selection.key(NAME), metadata=difference))
        if max(difference.values()) > REBUILD_TOLERANCE:
            raise dg.Failure(
                f"the basis differs from the one of all shards' moments by {difference}, allowed is "
                f"{REBUILD_TOLERANCE}; materialize {NAME} with rebuild: true",
                allow_retries=False,
            )

    @dg.job(
        name=selection.job_name("verify_basis"),
        executor_def=dg.in_process_executor,
        description="Compute the basis anew from the moments of all shards and compare; changes nothing.",
    )
    def verify_basis() -> None:
        verify_basis_op()

    return verify_basis


def rebuild_difference(artifacts: ArtifactStore) -> dict[str, float]:
    """How far the stored basis is from one that is computed anew, as it was, from its shards' moments.

    Returns:
        ``energies``: largest difference of the kept energies, relative to the largest;
        ``score_change``: bound on the mean absolute change of normalised scores.

    Raises:
        ArtifactMissingError: There is no basis, or moments that it was made of are gone.
    """
    from scalselect_assets.method.drift import basis_drift
    from scalselect_assets.method.rank import described_rule
    from scalselect_assets.method.subspace import fit_subspace

    stored, header = read_basis(artifacts)
    versions = {shard: moments["data_version"] for shard, moments in json.loads(header["shards"]).items()}
    moments = pool_moments.rebuilt_totals(artifacts, versions).moments()
    rule = described_rule(json.loads(header["rank_rule"]))
    rebuilt = fit_subspace(moments, rule, standardise=json.loads(header["standardise"]))
    width = max(stored.rank, rebuilt.rank)
    energies = [np.pad(one.spectrum, (0, width - one.rank)) for one in (stored, rebuilt)]
    largest = max(float(energies[1].max(initial=0.0)), np.finfo(np.float64).tiny)
    return {
        "energies": float(np.abs(energies[0] - energies[1]).max(initial=0.0)) / largest,
        "score_change": float(basis_drift(stored, rebuilt, moments).score_change),
    }


def moments_headers(
    selection: Selection, artifacts: ArtifactStore, shards: Sequence[str], fingerprint: str
) -> dict[str, dict[str, str]]:
    """The headers of the moments that belong into a basis, by shard.

    A shard is left out where its moments could not be made (again): it has none, or they are another
    model's, of other vectors than it has now, or of vectors that were prepared otherwise. The caller reports
    it.
    """
    headers = {}
    for shard in shards:
        try:
            header = artifacts.read_header(embedding_moments.NAME, shard, suffix=".safetensors")
            _, embeddings = attention_embeddings.recorded_table(artifacts, shard)
        except (ArtifactMissingError, ArtifactCorruptError):
            continue
        expected = embedding_moments.provenance(selection, embeddings["data_version"])
        if (header["model_fingerprint"], header["provenance"]) == (fingerprint, expected):
            headers[shard] = header
    return headers


def _require_moments(
    artifacts: ArtifactStore, shards: Sequence[str], inputs: Mapping[str, object], fingerprint: str
) -> None:
    """No shard drops out of the selection because a fault came between its vectors and its moments.

    Raises:
        dg.Failure: A shard of the last basis has vectors of the present model, but not their moments.
    """
    try:
        last = json.loads(artifacts.read_header(NAME, suffix=".safetensors")["shards"])
    except (ArtifactMissingError, ArtifactCorruptError):
        return
    behind = [
        shard
        for shard in shards
        if shard in last and shard not in inputs and _model_of(artifacts, shard) == fingerprint
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
        return attention_embeddings.recorded_table(artifacts, shard)[0].fingerprint
    except (ArtifactMissingError, ArtifactCorruptError):
        return None


def _rank_alternatives(
    storage: StorageResource, selection: Selection, axes: "PrincipalAxes", k: int, shards: list[str]
) -> dg.TableMetadataValue:
    """What neighbouring thresholds and the other rules would choose, on a sample of the pool."""
    from scalselect_assets.method.rank import EffectiveRank, EnergyThreshold, GavishDonoho, RankRule
    from scalselect_assets.method.sensitivity import rank_alternatives

    threshold = selection.energy
    neighbours = [threshold - 0.1, threshold - 0.05, threshold, (1 + threshold) / 2]
    rules: list[RankRule] = [EnergyThreshold(round(share, 6)) for share in neighbours if share > 0]
    rules.append(EffectiveRank())
    if 2 * axes.rank > min(axes.n - 1, axes.d):  # else the rule has no noise to measure
        rules.append(GavishDonoho())
    ranks = {rule_told(selection.rank_rule.describe()): k}
    for rule in rules:
        ranks.setdefault(rule_told(rule.describe()), rule.rank(axes.spectrum, axes.n, axes.d))
    compared = {rule: rank for rule, rank in ranks.items() if rank <= max(k, _COMPARED_RANK)}
    x = _sample(storage, selection, shards)
    size = budget_size(selection.expected_share(axes.n), len(x))
    alternatives = rank_alternatives(x, axes.subspace(max(compared.values())), k, compared, size)
    curve = axes.energy_curve()
    overlaps = {one.rule: round(one.overlap, 4) for one in alternatives}
    rows: list[dict[str, Any]] = [
        {
            "rule": rule,
            "k": rank,
            "energy": round(float(curve[rank - 1]), 4) if rank else 0.0,
            "overlap": overlaps.get(rule),
            "chosen_samples": size,
            "compared_samples": len(x),
        }
        for rule, rank in ranks.items()
    ]
    return dg.MetadataValue.table(
        [dg.TableRecord(row) for row in rows], schema=column_schema(RANK_ALTERNATIVES)
    )


def _sample(storage: StorageResource, selection: Selection, shards: list[str]) -> NDArray[Any]:
    """Vectors of the pool, (m, d): all of a small one, else a bounded number, the same at every call."""
    from scalselect_assets.method.preprocessing import prepared_rows

    generator = np.random.default_rng(0)
    artifacts, embeddings = storage.artifacts(selection.store), storage.embeddings(selection.store)
    tables: list[EmbeddingTable] = []
    for shard in generator.permutation(np.array(shards, dtype=object)):
        table, _ = attention_embeddings.recorded_table(artifacts, shard)
        if table.n_rows:
            tables.append(table)
        if len(tables) == _SAMPLE_SHARDS:
            break
    share = min(1.0, _SAMPLE_ROWS / sum(table.n_rows for table in tables))
    vectors = [
        embeddings.take(
            table,
            np.sort(
                generator.choice(table.n_rows, max(1, int(share * table.n_rows)), replace=False)
            ).tolist(),
        )
        for table in tables
    ]
    return prepared_rows(np.concatenate(vectors), to_unit_length=selection.unit_rows)


def rule_told(rule: Mapping[str, Any]) -> str:
    """A rank rule in words."""
    name, *rest = rule.values()
    return " ".join([str(name), *(f"{value:g}" for value in rest)])


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
