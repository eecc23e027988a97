"""The subspace equals the one of a full SVD, and its edge cases end where they should."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, save

from scalselect_assets.method.moments import Moments, NonFiniteError, accumulate
from scalselect_assets.method.subspace import DEFAULT_ENERGY_THRESHOLD, Subspace, fit_subspace


def rows(n: int, d: int, seed: int = 0) -> NDArray[np.float64]:
    """Full-rank rows whose singular values fall by a factor of 20 and lie apart."""
    return np.random.default_rng(seed).normal(size=(n, d)) * np.geomspace(1, 0.05, d) + np.arange(d)


def with_energies(energies: list[float]) -> Moments:
    """Moments whose squared singular values are ``energies``, along the axes."""
    return Moments(1000, np.zeros(len(energies)), np.diag(energies))


def fit(x: NDArray[Any], threshold: float = DEFAULT_ENERGY_THRESHOLD) -> Subspace:
    return fit_subspace(Moments.of(x), threshold)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 60), d=st.integers(1, 30), seed=st.integers(0, 100), threshold=st.floats(0.05, 0.99))
def test_it_equals_the_svd_of_the_centred_matrix(n, d, seed, threshold):
    x = rows(n, d, seed)
    _, s, Vt = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    k = int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), threshold)) + 1

    subspace = fit(x, threshold)
    assert (subspace.n, subspace.d, subspace.k, subspace.rank) == (n, d, k, min(n - 1, d))
    np.testing.assert_allclose(subspace.singular_values, s[:k], rtol=1e-9)
    np.testing.assert_allclose(subspace.spectrum, s[: subspace.rank] ** 2, rtol=1e-9, atol=1e-13 * s[0] ** 2)
    np.testing.assert_allclose(subspace.mean, x.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(subspace.directions.T @ subspace.directions, np.eye(k), atol=1e-12)
    V = Vt[:k].T
    np.testing.assert_allclose(subspace.directions @ subspace.directions.T, V @ V.T, atol=1e-7)


def test_the_largest_component_of_every_direction_is_positive():
    for seed in range(5):
        directions = fit(rows(80, 12, seed), 1.0).directions
        largest = np.abs(directions).argmax(axis=0)
        assert (directions[largest, np.arange(12)] > 0).all()


def test_neither_shards_nor_order_nor_mirroring_the_data_changes_the_directions():
    x = rows(120, 8)
    want = fit(x)
    shards = np.split(np.random.default_rng(1).permutation(x), [5, 5, 70])
    for got in (fit_subspace(accumulate(shards, 8)), fit(-x)):
        assert got.k == want.k
        np.testing.assert_allclose(got.directions, want.directions, atol=1e-10)


@pytest.mark.parametrize(
    ("energies", "threshold", "k"),
    [
        ([9, 1], 0.9, 1),  # reaching is enough
        ([9, 1], 0.900001, 2),
        ([8.999, 1.001], 0.9, 2),
        ([7, 2, 1], 0.9, 2),  # 0.7 + 0.2 is 0.8999... in float64
        ([1] * 10, 0.9, 9),
        ([5, 3, 2], 0.5, 1),
        ([5, 3, 2], 1e-12, 1),  # never an empty subspace where there is energy
        ([5, 3, 2], 1.0, 3),
        ([5, 3, 1e-10], 1.0, 3),
        ([5, 3, 0], 1.0, 2),  # the rank, never rank + 1
        ([5, 3, 1e-15], 1.0, 2),
        ([1 / 3, 1 / 7, 1 / 11, 1 / 13], 1.0, 4),
        ([4], 0.9, 1),
    ],
)
def test_k_is_the_first_count_that_reaches_the_threshold(energies: list[float], threshold: float, k: int):
    assert fit_subspace(with_energies(energies), threshold).k == k


def test_a_tie_with_the_threshold_does_not_depend_on_rounding():
    noise = np.random.default_rng(0).normal(size=(200, 3)) * 1e-14
    assert {fit_subspace(with_energies(list(np.array([70, 20, 10]) * (1 + row)))).k for row in noise} == {2}


@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 40), d=st.integers(1, 20), seed=st.integers(0, 100))
def test_a_threshold_of_one_keeps_the_whole_rank(n, d, seed):
    subspace = fit(rows(n, d, seed), 1.0)
    assert subspace.k == subspace.rank == min(n - 1, d)
    assert subspace.energy == 1.0


def test_the_default_threshold_is_the_papers():
    assert DEFAULT_ENERGY_THRESHOLD == 0.9
    assert fit_subspace(with_energies([80, 11, 9])).k == 2


def test_the_energy_is_the_share_that_the_kept_directions_hold():
    subspace = fit_subspace(with_energies([6, 3, 1]), 0.8)
    assert subspace.k == 2
    assert subspace.energy == pytest.approx(0.9)
    np.testing.assert_allclose(subspace.energy_curve(), [0.6, 0.9, 1.0])
    np.testing.assert_allclose(subspace.spectrum, [6, 3, 1])
    np.testing.assert_allclose(subspace.singular_values, np.sqrt([6, 3]))


def test_dependent_and_constant_columns_add_no_rank():
    x = rows(100, 3)
    wide = np.column_stack([x, x[:, 0], x @ [1, -2, 3], np.full(100, 0.1)])
    subspace = fit_subspace(accumulate(np.array_split(wide, 7), 6), 1.0)
    assert subspace.rank == subspace.k == 3
    np.testing.assert_allclose(subspace.directions[5], np.zeros(3), atol=1e-12)


def test_n_rows_have_at_most_rank_n_minus_one_whatever_rounding_adds():
    moments = Moments(3, np.zeros(4), np.diag([4, 3, 1e-12, 1e-13]))
    assert fit_subspace(moments, 1.0).rank == 2


@pytest.mark.parametrize("value", [0.1, 1e6 / 3, -12345.678])
@pytest.mark.parametrize("n", [1, 2, 1000])
def test_rows_without_any_difference_have_an_empty_subspace(n: int, value: float):
    subspace = fit_subspace(accumulate(np.array_split(np.full((n, 4), value), 3), 4))
    assert (subspace.n, subspace.k, subspace.rank, subspace.energy) == (n, 0, 0, 0.0)
    assert subspace.directions.shape == (4, 0)
    assert subspace.energy_curve().shape == (0,)


def test_no_rows_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"0 rows.*Embed at least one shard"):
        fit_subspace(Moments.empty(3))


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.0000001, 90, np.nan])
def test_a_threshold_outside_its_range_is_refused(threshold: float):
    with pytest.raises(ValueError, match=r"energy threshold .*above 0 and at most 1"):
        fit(rows(5, 2), threshold)


def test_a_scatter_that_overflowed_is_refused_rather_than_taken_for_no_energy():
    with pytest.raises(NonFiniteError, match="scatter"):
        fit_subspace(with_energies([np.inf, 1.0]))


@pytest.mark.parametrize("x", [rows(50, 6), rows(1, 6)], ids=["k above 0", "k of 0"])
def test_a_round_trip_through_safetensors_is_exact(x: NDArray[np.float64]):
    subspace = fit(x)
    restored = Subspace.from_arrays(load(save(subspace.to_arrays())))
    assert restored.n == subspace.n
    assert type(restored.n) is int
    for name in ("mean", "directions", "singular_values", "spectrum"):
        np.testing.assert_array_equal(getattr(restored, name), getattr(subspace, name), err_msg=name)


def test_stored_arrays_that_contradict_each_other_are_refused():
    arrays = fit(rows(50, 6)).to_arrays()
    with pytest.raises(ValueError, match=r"'directions' of shape \(5, 4\)"):
        Subspace.from_arrays(arrays | {"directions": np.zeros((5, 4))})
    with pytest.raises(ValueError, match="1 energies"):
        Subspace.from_arrays(arrays | {"spectrum": np.ones(1)})
    with pytest.raises(ValueError, match="expected one named 'spectrum'"):
        Subspace.from_arrays({name: array for name, array in arrays.items() if name != "spectrum"})
