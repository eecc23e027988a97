"""How far the basis has moved, and which earlier basis a shard's scores may still be of.

At every new basis the drift from the one before is computed and shown. By default all shards are then
scored again, which is one matrix product over the pool. Where a selection sets ``max_drift``, shards whose
vectors are as they were keep the scores that they have while the proved bound on the error stays at or below
it. The basis says so for each shard, and keeps the earlier bases that are still in force, so that these
scores can be made again from what the store holds. Costs: d² operations per direction for each earlier basis,
of which there are a few at most.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from upath import UPath

from resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from resources.identity import digest

if TYPE_CHECKING:
    from scalselect_assets.method.moments import Moments
    from scalselect_assets.method.subspace import Subspace

BASIS = "subspace_basis"
EARLIER = "earlier_bases"

# Every basis in force is compared with the next one, and scores of many bases compare ever less well.
_EARLIER_AT_MOST = 8


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
        drift: From the last other basis, as plain numbers for the UI to plot over time: the bound on the mean
            absolute change of the normalised scores, the largest principal angle, and the share of the
            energy that lay in the old subspace. Empty where there was none that can be compared.
        plan: Which shards keep their scores.
    """

    drift: Mapping[str, float]
    plan: ScorePlan

    def to_header(self) -> dict[str, str]:
        """What the basis carries of its history."""
        return {**self.plan.to_header(), "drift": json.dumps(dict(self.drift))}

    def metadata(self) -> dict[str, Any]:
        """Plain numbers for the UI."""
        return {
            **{f"drift_{name}": value for name, value in self.drift.items()},
            "shards_keeping_scores": len(self.plan.kept),
            "score_error_bound": self.plan.error_bound,
        }


def compare(
    artifacts: ArtifactStore,
    subspace: "Subspace",
    moments: "Moments",
    header: Mapping[str, str],
    *,
    max_drift: float,
) -> BasisHistory:
    """Compare a new basis with the stored one, and decide which shards keep their scores.

    The errors of several earlier bases add up. Those that spare the most rows for their error come first, as
    many as their sum and a limit of 8 allow.

    Args:
        artifacts: The store.
        subspace: The new basis.
        moments: Of the pool that it was fitted on.
        header: Of the new basis: its version, shards, model and preprocessing.
        max_drift: Bound on the mean absolute error; 0 keeps nothing.
    """
    from scalselect_assets.method.drift import basis_drift

    version = header["data_version"]
    rescored = ScorePlan(version, {}, {})
    last = _read(artifacts, BASIS, None)
    if last is None or any(last[1][name] != header[name] for name in ("model_fingerprint", "unit_rows")):
        return BasisHistory({}, rescored)
    last_subspace, last_header = last
    if last_header["data_version"] == version:
        # Made again, after a crash or for a rebuild: it has moved from where it had moved before.
        drift = dict(json.loads(last_header["drift"]))
        last_change = 0.0
    else:
        moved = basis_drift(last_subspace, subspace, moments)
        last_change = moved.score_change
        drift = {
            "score_change": moved.score_change,
            "largest_angle_degrees": moved.largest_angle,
            "energy_kept": moved.energy_kept,
        }
    if max_drift == 0:
        return BasisHistory(drift, rescored)

    inputs, before = json.loads(header["shards"]), json.loads(last_header["shards"])
    plan = ScorePlan.from_header(last_header)
    scored_with = {
        shard: plan.of_shard(shard)
        for shard, moments_header in inputs.items()
        if before.get(shard, {}).get("attention_embeddings") == moments_header["attention_embeddings"]
    }
    rows = Counter[str]()
    for shard, earlier_version in scored_with.items():
        rows[earlier_version] += int(inputs[shard]["rows"])
    changes: dict[str, float] = {}
    for earlier_version in rows.keys() - {version}:
        if earlier_version == last_header["data_version"]:
            changes[earlier_version] = last_change
        elif (earlier := _read(artifacts, EARLIER, earlier_version)) is not None:
            changes[earlier_version] = basis_drift(earlier[0], subspace, moments).score_change
    bounds: dict[str, float] = {}
    for earlier_version, change in sorted(
        changes.items(), key=lambda item: (item[1] / max(1, rows[item[0]]), item[0])
    ):
        if sum(bounds.values()) + change <= max_drift and len(bounds) < _EARLIER_AT_MOST:
            bounds[earlier_version] = change
    kept = {shard: earlier for shard, earlier in scored_with.items() if earlier in bounds}
    return BasisHistory(drift, ScorePlan(version, kept, bounds))


def replace_basis(
    artifacts: ArtifactStore,
    arrays: Mapping[str, NDArray[Any]],
    header: Mapping[str, str],
    history: BasisHistory,
) -> tuple[UPath, int]:
    """Write a basis, keeping those before it that scores are still of; returns its path and bytes."""
    bounds = history.plan.bounds
    last = _read(artifacts, BASIS, None) if bounds else None
    if last is not None and (version := last[1]["data_version"]) in bounds:
        artifacts.write_arrays(EARLIER, last[0].to_arrays(), {"data_version": version}, version)
    written = artifacts.write_arrays(
        BASIS,
        arrays,
        {**header, **history.to_header()},
    )
    in_force = {artifacts.path(EARLIER, version, suffix=".safetensors") for version in bounds}
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


def is_whole(artifacts: ArtifactStore, plan: ScorePlan) -> bool:
    """Whether the earlier bases that scores are still of are there."""
    try:
        for version in plan.bounds:
            artifacts.read_header(EARLIER, version, suffix=".safetensors")
    except (ArtifactMissingError, ArtifactCorruptError):
        return False
    return True


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
