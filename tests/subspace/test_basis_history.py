"""A new basis is compared with the last one where that makes sense."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from upath import UPath

from scalselect_assets.method.subspace.basis import Subspace, fit_subspace
from scalselect_assets.method.subspace.drift import basis_drift
from scalselect_assets.method.subspace.moments import Moments
from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.subspace.basis_history import BASIS, drift_since_last
from tests.headers import basis_header


def pool_of(n: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(n, 8)) * np.geomspace(1, 0.2, 8)


class Nights:
    """A store whose basis is replaced night by night."""

    def __init__(self, root: Path) -> None:
        self.artifacts = ArtifactStore(UPath(root))

    def rebase(
        self, x: NDArray[np.float64], version: str, *, model: str = "model", unit_rows: bool = False
    ) -> dict[str, float]:
        """Replace the stored basis by one of the rows; returns the drift that it carries."""
        moments = Moments.of(x)
        subspace = fit_subspace(moments)
        header = basis_header(version, model=model, unit_rows=unit_rows)
        drift = drift_since_last(self.artifacts, subspace, moments, header)
        stated = header.model_copy(update={"drift": drift}).to_header()
        self.artifacts.write_arrays(BASIS, subspace.to_arrays(), stated)
        return drift

    def stored(self) -> Subspace:
        return Subspace.from_arrays(self.artifacts.read_arrays(BASIS)[0])


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    return Nights(tmp_path)


def test_the_first_basis_has_nothing_to_drift_from(nights: Nights):
    assert nights.rebase(pool_of(400), "1") == {}


def test_the_drift_is_that_from_the_stored_basis(nights: Nights):
    nights.rebase(pool_of(400), "1")
    first, grown = nights.stored(), pool_of(450)
    drift = nights.rebase(grown, "2")
    expected = basis_drift(first, nights.stored(), Moments.of(grown))
    assert drift == {
        "score_change": pytest.approx(expected.score_change),
        "largest_angle_degrees": pytest.approx(expected.largest_angle),
        "energy_kept": pytest.approx(expected.energy_kept),
    }
    assert drift["score_change"] > 0


@pytest.mark.parametrize("other", [{"model": "another"}, {"unit_rows": True}])
def test_bases_of_other_vectors_are_not_compared(nights: Nights, other: dict[str, Any]):
    nights.rebase(pool_of(400), "1")
    assert nights.rebase(pool_of(450), "2", **other) == {}


def test_a_basis_that_is_made_again_keeps_the_drift_that_it_had(nights: Nights):
    nights.rebase(pool_of(400), "1")
    moved = nights.rebase(pool_of(450), "2")
    assert moved["score_change"] > 0
    assert nights.rebase(pool_of(450), "2") == moved


def test_a_damaged_basis_is_not_compared(nights: Nights):
    nights.rebase(pool_of(400), "1")
    path = nights.artifacts.path(BASIS, suffix=".safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    assert nights.rebase(pool_of(450), "2") == {}
