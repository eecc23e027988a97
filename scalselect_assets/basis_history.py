"""How far the basis has moved, and which earlier basis a shard's scores may still be of.

At every new basis the drift from the one before is computed and shown. By default all shards are then
scored again, which is one matrix product over the pool. Where a selection sets ``max_drift``, shards whose
vectors are as they were keep the scores that they have while the proved bound on the error stays at or below
it. The basis says so for each shard, and keeps the earlier bases that are still in force, so that the scores
can be made again, bit for bit, from what the store holds.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from upath import UPath

from resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from resources.identity import digest

if TYPE_CHECKING:
    from scalselect_assets.method.drift import Drift
    from scalselect_assets.method.moments import Moments
    from scalselect_assets.method.subspace import Subspace

BASIS = "subspace_basis"
EARLIER = "earlier_bases"


@dataclass(frozen=True, slots=True)
class ScorePlan:
    """Which basis the scores of each shard are of.

    Attributes:
        basis: Version of the present basis.
        kept: By shard, the version of the earlier basis that its scores stay with; all others are scored with
            the present one.
        bounds: By version in ``kept``, the bound on the mean absolute error over the pool of the normalised
            scores that it gives.
    """

    basis: str
    kept: Mapping[str, str]
    bounds: Mapping[str, float]

    @classmethod
    def from_header(cls, header: Mapping[str, str]) -> "ScorePlan":
        """The plan that a basis carries."""
        return cls(
            header["data_version"],
            json.loads(header["kept_scores"]),
            json.loads(header["score_error_bounds"]),
        )

    def to_header(self) -> dict[str, str]:
        """What `from_header` reads, beside the basis' own version."""
        return {
            "kept_scores": json.dumps(dict(self.kept), sort_keys=True),
            "score_error_bounds": json.dumps(dict(self.bounds), sort_keys=True),
        }

    @property
    def version(self) -> str:
        """What the scores of all shards together are computed from."""
        return digest(self.basis, dict(self.kept))

    @property
    def error_bound(self) -> float:
        """Bound on the mean absolute error of the pool's normalised scores, whose mean is 1."""
        return float(sum(self.bounds.values()))

    def of_shard(self, shard: str) -> str:
        """The version of the basis that a shard's scores are to be of."""
        return self.kept.get(shard, self.basis)


@dataclass(frozen=True, slots=True)
class BasisHistory:
    """A new basis against those before it.

    Attributes:
        drift: From the last basis; none where there was none that can be compared.
        plan: Which shards keep their scores.
    """

    drift: "Drift | None"
    plan: ScorePlan

    def metadata(self) -> dict[str, Any]:
        """Plain numbers, for the UI to plot over time."""
        drift = (
            {}
            if self.drift is None
            else {
                "drift_score_change": self.drift.score_change,
                "drift_largest_angle_degrees": self.drift.largest_angle,
                "drift_energy_kept": self.drift.energy_kept,
            }
        )
        return {
            **drift,
            "shards_keeping_scores": len(self.plan.kept),
            "score_error_bound": self.plan.error_bound,
        }


def compare(
    artifacts: ArtifactStore,
    subspace: "Subspace",
    moments: "Moments",
    version: str,
    inputs: Mapping[str, Mapping[str, str]],
    *,
    max_drift: float,
    unit_rows: bool,
) -> BasisHistory:
    """Compare a new basis with the stored one, and decide which shards keep their scores.

    The errors of several earlier bases add up, so the closest are kept first while their sum allows.

    Args:
        artifacts: The store.
        subspace: The new basis.
        moments: Of the pool that it was fitted on.
        version: Of the new basis.
        inputs: Headers of the shards' moments, by shard.
        max_drift: Bound on the mean absolute error; 0 keeps nothing.
        unit_rows: Whether rows are scaled to length 1.
    """
    from scalselect_assets.method.drift import basis_drift

    rescored = ScorePlan(version, {}, {})
    last = _read(artifacts, BASIS, None)
    if last is None or last[0].d != subspace.d or json.loads(last[1]["unit_rows"]) != unit_rows:
        return BasisHistory(None, rescored)
    last_subspace, header = last
    drift = basis_drift(last_subspace, subspace, moments)
    if max_drift == 0:
        return BasisHistory(drift, rescored)

    before = json.loads(header["shards"])
    unchanged = [
        shard
        for shard, moments_header in inputs.items()
        if before.get(shard, {}).get("attention_embeddings") == moments_header["attention_embeddings"]
    ]
    plan = ScorePlan.from_header(header)
    scored_with = {shard: plan.of_shard(shard) for shard in unchanged}
    changes: dict[str, float] = {}
    for earlier_version in set(scored_with.values()) - {version}:
        if earlier_version == header["data_version"]:
            changes[earlier_version] = drift.score_change
        elif (earlier := _read(artifacts, EARLIER, earlier_version)) is not None:
            changes[earlier_version] = basis_drift(earlier[0], subspace, moments).score_change
    bounds: dict[str, float] = {}
    for earlier_version, change in sorted(changes.items(), key=lambda item: (item[1], item[0])):
        if sum(bounds.values()) + change > max_drift:
            break
        bounds[earlier_version] = change
    kept = {shard: earlier for shard, earlier in scored_with.items() if earlier in bounds}
    return BasisHistory(drift, ScorePlan(version, kept, bounds))


def replace_basis(
    artifacts: ArtifactStore,
    arrays: Mapping[str, NDArray[Any]],
    header: Mapping[str, str],
    plan: ScorePlan,
) -> tuple[UPath, int]:
    """Write a basis, keeping those before it that scores are still of; returns its path and bytes."""
    last = _read(artifacts, BASIS, None)
    if last is not None and last[1]["data_version"] in plan.bounds:
        artifacts.write_arrays(EARLIER, last[0].to_arrays(), last[1], last[1]["data_version"])
    written = artifacts.write_arrays(
        BASIS,
        arrays,
        {**header, **plan.to_header()},
    )
    in_force = {artifacts.path(EARLIER, version, suffix=".safetensors") for version in plan.bounds}
    for path in artifacts.paths(EARLIER, suffix=".safetensors"):
        if path not in in_force:
            path.unlink(missing_ok=True)
    return written


def read_scoring_basis(artifacts: ArtifactStore, plan: ScorePlan, version: str) -> "Subspace":
    """A basis that scores are to be of.

    Raises:
        ArtifactMissingError: It is not in the store.
    """
    from scalselect_assets.method.subspace import Subspace

    place = (BASIS, None) if version == plan.basis else (EARLIER, version)
    return Subspace.from_arrays(artifacts.read_arrays(*place)[0])


def _read(
    artifacts: ArtifactStore, asset: str, version: str | None
) -> tuple["Subspace", dict[str, str]] | None:
    """A stored basis, if it is there and whole; without it, there is nothing to compare with or to keep."""
    from scalselect_assets.method.subspace import Subspace

    try:
        arrays, header = artifacts.read_arrays(asset, version)
        return Subspace.from_arrays(arrays), header
    except (ArtifactMissingError, ArtifactCorruptError, ValueError):
        return None
