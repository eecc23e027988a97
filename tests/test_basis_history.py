"""Which shards keep the scores of an earlier basis, and how wrong these can be."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from resources.artifacts import ArtifactMissingError, ArtifactStore
from scalselect_assets.basis_history import (
    EARLIER,
    ScorePlan,
    compare,
    is_whole,
    read_scoring_basis,
    replace_basis,
)
from scalselect_assets.method.leverage import LeverageScorer
from scalselect_assets.method.moments import Moments
from scalselect_assets.method.subspace import Subspace, fit_subspace


class Nights:
    """A pool of shards that grows night by night, with its bases in a store."""

    def __init__(self, root: Path, max_drift: float) -> None:
        self.artifacts = ArtifactStore(UPath(root))
        self.max_drift = max_drift
        self.shards: dict[str, np.ndarray] = {}
        self.bases: dict[str, Subspace] = {}
        self.night = 0
        self.drift: Mapping[str, float] = {}

    def add(self, shard: str, seed: int, n: int = 400, shift: float = 0.0) -> None:
        spread = np.geomspace(1, 0.2, 8)
        self.shards[shard] = np.random.default_rng(seed).normal(size=(n, 8)) * spread + shift

    def rebase(self, *, fingerprint: str = "model") -> ScorePlan:
        self.night += 1
        version = f"basis {self.night}"
        moments = Moments.of(np.concatenate(list(self.shards.values())))
        subspace = self.bases[version] = fit_subspace(moments)
        inputs = {
            shard: {"attention_embeddings": str(x.sum()), "rows": str(len(x))}
            for shard, x in self.shards.items()
        }
        header = {
            "data_version": version,
            "model_fingerprint": fingerprint,
            "unit_rows": "false",
            "shards": json.dumps(inputs),
        }
        history = compare(self.artifacts, subspace, moments, header, max_drift=self.max_drift)
        replace_basis(self.artifacts, subspace.to_arrays(), header, history)
        self.drift = history.drift
        assert is_whole(self.artifacts, history.plan)
        return history.plan

    def mean_error(self, plan: ScorePlan) -> float:
        """Of the normalised scores under the plan, against those of the present basis for all rows."""
        errors = []
        for shard, x in self.shards.items():
            planned, present = (
                LeverageScorer(basis)
                for basis in (
                    read_scoring_basis(self.artifacts, plan, plan.of_shard(shard)),
                    self.bases[plan.basis],
                )
            )
            errors.append(
                np.abs(planned.scores(x) * planned.normalisation - present.scores(x) * present.normalisation)
            )
        return float(np.concatenate(errors).mean())


def test_by_default_every_shard_is_scored_again(tmp_path: Path):
    nights = Nights(tmp_path, max_drift=0)
    for night in range(3):
        nights.add(f"shard {night}", night)
        plan = nights.rebase()
        assert (plan.kept, plan.bounds, plan.error_bound) == ({}, {}, 0.0)
    assert nights.artifacts.paths(EARLIER, suffix=".safetensors") == []


def test_below_the_bound_old_shards_keep_their_scores_and_the_bound_holds(tmp_path: Path):
    nights = Nights(tmp_path, max_drift=0.2)
    nights.add("old", 0, n=8000)
    nights.rebase()
    for night in range(1, 5):
        nights.add(f"new {night}", night, n=100)
        plan = nights.rebase()
        assert plan.kept["old"] == "basis 1"
        assert plan.of_shard(f"new {night}") == f"basis {night + 1}"
        assert 0 < nights.mean_error(plan) <= plan.error_bound <= 0.2


def test_the_errors_of_several_bases_stay_below_the_bound_and_spare_the_most_rows(tmp_path: Path):
    nights = Nights(tmp_path, max_drift=0.05)
    nights.add("old", 0, n=8000)
    nights.rebase()
    for night in range(1, 12):
        nights.add(f"new {night}", night, n=50)
        plan = nights.rebase()
        assert nights.mean_error(plan) <= plan.error_bound <= 0.05
        assert plan.kept["old"] == "basis 1"  # 8000 rows for one bound, before 50 for another
        in_force = set(plan.kept.values())
        assert set(plan.bounds) == in_force
        assert len(in_force) <= 8
        kept_files = {path.name for path in nights.artifacts.paths(EARLIER, suffix=".safetensors")}
        assert kept_files == {
            nights.artifacts.path(EARLIER, version, suffix=".safetensors").name for version in in_force
        }
    assert len(plan.kept) < 12


def test_above_the_bound_everything_is_scored_again(tmp_path: Path):
    nights = Nights(tmp_path, max_drift=0.2)
    nights.add("old", 0)
    nights.rebase()
    nights.add("elsewhere", 1, shift=5.0)
    plan = nights.rebase()
    assert (plan.kept, plan.error_bound) == ({}, 0.0)


def test_a_changed_shard_is_scored_with_the_new_basis(tmp_path: Path):
    nights = Nights(tmp_path, max_drift=0.5)
    nights.add("old", 0, n=4000)
    nights.add("other", 1)
    nights.rebase()
    nights.add("other", 2)
    plan = nights.rebase()
    assert (plan.of_shard("old"), plan.of_shard("other")) == ("basis 1", "basis 2")


def test_an_earlier_basis_that_is_lost_is_not_kept(tmp_path: Path):
    nights = Nights(tmp_path, max_drift=0.5)
    nights.add("old", 0, n=4000)
    nights.rebase()
    nights.add("new 1", 1, n=20)
    plan = nights.rebase()
    (earlier,) = nights.artifacts.paths(EARLIER, suffix=".safetensors")
    earlier.unlink()
    assert not is_whole(nights.artifacts, plan)
    with pytest.raises(ArtifactMissingError, match="earlier_bases"):
        read_scoring_basis(nights.artifacts, plan, "basis 1")
    nights.add("new 2", 2, n=20)
    plan = nights.rebase()
    assert plan.of_shard("old") == "basis 3"
    assert plan.of_shard("new 1") == "basis 2"


def test_bases_of_another_model_are_not_compared(tmp_path: Path):
    nights = Nights(tmp_path, max_drift=0.5)
    nights.add("old", 0)
    nights.rebase()
    plan = nights.rebase(fingerprint="another")
    assert (plan.kept, nights.drift) == ({}, {})


def test_a_basis_that_is_made_again_keeps_the_drift_that_it_had(tmp_path: Path):
    nights = Nights(tmp_path, max_drift=0)
    nights.add("old", 0)
    nights.rebase()
    assert nights.drift == {}
    nights.add("new", 1)
    nights.rebase()
    moved = nights.drift
    assert moved["score_change"] > 0
    nights.night -= 1  # the process died before the run was recorded; the next makes the same version
    nights.rebase()
    assert nights.drift == moved


def test_a_plan_survives_the_header_and_its_version_covers_it():
    plan = ScorePlan("now", {"a": "then"}, {"then": 0.01})
    again = ScorePlan.from_header({"data_version": "now", **plan.to_header()})
    assert again == plan
    assert plan.version != ScorePlan("now", {}, {}).version
