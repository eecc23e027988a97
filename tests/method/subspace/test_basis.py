"""The subspace equals the one of a full SVD, and its edge cases end where they should."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, save

from scalselect_assets.method.subspace.basis import Subspace, fit_subspace, principal_axes
from scalselect_assets.method.subspace.moments import Moments, NonFiniteError, accumulate
from scalselect_assets.method.subspace.rank import (
    DEFAULT_ENERGY_THRESHOLD,
    EffectiveRank,
    EnergyThreshold,
    FixedRank,
    GavishDonoho,
)
from tests.method.vectors import with_outlier_dimensions


def rows(n: int, d: int, seed: int = 0) -> NDArray[np.float64]:
    """Full-rank rows whose singular values fall by a factor of 20 and lie apart."""
    return np.random.default_rng(seed).normal(size=(n, d)) * np.geomspace(1, 0.05, d) + np.arange(d)


def with_scatter(scatter: NDArray[np.float64], n: int = 1000) -> Moments:
    return Moments(n, np.zeros(len(scatter)), scatter[np.triu_indices(len(scatter))])


def with_energies(energies: list[float]) -> Moments:
    """Moments whose squared singular values are ``energies``, along the axes."""
    return with_scatter(np.diag(np.array(energies, dtype=np.float64)))


def rotated(energies: NDArray[np.float64], seed: int = 0) -> NDArray[np.float64]:
    """A scatter matrix with these eigenvalues, along no axis."""
    d = len(energies)
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    scatter = (Q * energies) @ Q.T
    return (scatter + scatter.T) / 2


def fit(
    x: NDArray[Any], threshold: float = DEFAULT_ENERGY_THRESHOLD, *, standardise: bool = False
) -> Subspace:
    return fit_subspace(Moments.of(x), EnergyThreshold(threshold), standardise=standardise)


def scores(x: NDArray[Any], subspace: Subspace) -> NDArray[np.float64]:
    return np.square((x - subspace.mean) @ subspace.whitening).sum(axis=1)


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


@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 40), d=st.integers(1, 20), seed=st.integers(0, 100))
def test_a_threshold_of_one_keeps_the_whole_rank(n, d, seed):
    subspace = fit(rows(n, d, seed), 1.0)
    assert subspace.k == subspace.rank == min(n - 1, d)
    assert subspace.energy == 1.0


def test_the_default_rule_is_the_papers():
    assert fit_subspace(with_energies([80, 11, 9])).k == 2
    assert fit_subspace(with_energies([80, 9, 11]), EnergyThreshold(0.95)).k == 3


def test_the_rule_chooses_the_number_of_directions():
    x = rows(200, 12)
    axes = principal_axes(Moments.of(x))
    for rule in (FixedRank(5), FixedRank(99), GavishDonoho(), EffectiveRank()):
        assert fit_subspace(Moments.of(x), rule).k == rule.rank(axes.spectrum, 200, 12)
    assert fit_subspace(Moments.of(x), FixedRank(99)).k == 12


def test_the_energy_is_the_share_that_the_kept_directions_hold():
    subspace = fit_subspace(with_energies([6, 3, 1]), EnergyThreshold(0.8))
    assert subspace.k == 2
    assert subspace.energy == pytest.approx(0.9)
    np.testing.assert_allclose(subspace.energy_curve(), [0.6, 0.9, 1.0])
    np.testing.assert_allclose(subspace.spectrum, [6, 3, 1])
    np.testing.assert_allclose(subspace.singular_values, np.sqrt([6, 3]))


def test_dependent_and_constant_columns_add_no_rank():
    x = rows(100, 3)
    wide = np.column_stack([x, x[:, 0], x @ [1, -2, 3], np.full(100, 0.1)])
    subspace = fit_subspace(accumulate(np.array_split(wide, 7), 6), EnergyThreshold(1.0))
    assert subspace.rank == subspace.k == 3
    np.testing.assert_allclose(subspace.directions[5], np.zeros(3), atol=1e-12)


def test_n_rows_have_at_most_rank_n_minus_one_whatever_rounding_adds():
    moments = with_scatter(np.diag([4, 3, 1e-12, 1e-13]), n=3)
    assert fit_subspace(moments, EnergyThreshold(1.0)).rank == 2


@pytest.mark.parametrize(("energies", "rank"), [([5, 3, 1e-10], 3), ([5, 3, 1e-15], 2), ([5, 3, 0], 2)])
def test_energies_at_the_level_of_rounding_add_no_rank(energies: list[float], rank: int):
    assert fit_subspace(with_energies(energies), EnergyThreshold(1.0)).rank == rank


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


def test_a_scatter_that_overflowed_is_refused_rather_than_taken_for_no_energy():
    with pytest.raises(NonFiniteError, match="scatter"):
        fit_subspace(with_energies([np.inf, 1.0]))


@settings(deadline=None, max_examples=40)
@given(
    groups=st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 12)), min_size=1, max_size=5),
    seed=st.integers(0, 100),
    k=st.integers(1, 60),
    diagonal=st.booleans(),
)
# LAPACK's MRRR gives vectors that are not orthogonal, and does not converge.
@example(
    [(158459.70324349203, 8), (740590.624694853, 8), (874967.0, 2), (0.0, 1), (874967.0, 8)], 52, 17, False
)
@example([(127036.0, 7), (417429.0, 10), (520074.0, 10)], 59, 27, False)
@example([(42348.0, 12), (764483.0, 8), (581484.0, 10)], 57, 30, False)
def test_repeated_energies_still_give_orthonormal_eigenvectors(groups, seed, k, diagonal):
    energies = np.concatenate([np.full(count, value) for value, count in groups])
    scatter = np.diag(energies) if diagonal else rotated(energies, seed)
    subspace = fit_subspace(with_scatter(scatter), FixedRank(k))
    V = subspace.directions
    np.testing.assert_allclose(V.T @ V, np.eye(subspace.k), atol=1e-12)
    np.testing.assert_allclose(
        scatter @ V, V * subspace.singular_values**2, atol=1e-12 * max(energies.max(), 1e-300)
    )


@pytest.mark.parametrize(
    "energies",
    [
        np.ones(200),
        1 + 1e-13 * np.random.default_rng(0).normal(size=200),
        np.r_[1e12, np.ones(199)],
        np.repeat(np.geomspace(1, 1e-9, 100), 2),
        np.geomspace(1, 1e-13, 200),
    ],
    ids=["equal", "nearly equal", "one far above", "pairs", "falling to rounding"],
)
@pytest.mark.parametrize("k", [1, 67, 200])
def test_clusters_of_energies_cost_no_orthogonality(energies: NDArray[np.float64], k: int):
    scatter = rotated(energies)
    subspace = fit_subspace(with_scatter(scatter), FixedRank(k))
    V = subspace.directions
    assert min(k, 190) <= subspace.k <= k
    np.testing.assert_allclose(V.T @ V, np.eye(subspace.k), atol=1e-11)
    residual = scatter @ V - V * np.square(subspace.singular_values)
    assert np.abs(residual).max() < 1e-13 * energies.max()


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_smallest_matrices_have_all_their_directions(d: int):
    for scatter in (np.eye(d), np.diag(np.arange(d) + 1.0), rotated(np.arange(d) + 1.0)):
        for k in range(d + 1):
            subspace = principal_axes(with_scatter(scatter)).subspace(k)
            assert subspace.directions.shape == (d, k)
            np.testing.assert_allclose(
                scatter @ subspace.directions, subspace.directions * subspace.singular_values**2, atol=1e-14
            )


def test_the_axes_give_any_number_of_directions_from_one_decomposition():
    axes = principal_axes(Moments.of(rows(60, 9)))
    whole = axes.subspace(9)
    assert (axes.n, axes.d, axes.rank) == (60, 9, 9)
    for k in (4, 0, 9, 1):
        part = axes.subspace(k)
        assert part.k == k
        assert part.directions.flags.c_contiguous
        np.testing.assert_allclose(part.directions, whole.directions[:, :k], atol=1e-12)
        np.testing.assert_array_equal(part.spectrum, axes.spectrum)


@pytest.mark.parametrize("k", [-1, 5])
def test_more_directions_than_the_rank_are_refused(k: int):
    with pytest.raises(ValueError, match=rf"Got {k} directions; allowed is 0 to 4"):
        principal_axes(Moments.of(rows(5, 9))).subspace(k)


def test_the_moments_are_left_as_they_were():
    moments = Moments.of(rows(40, 7))
    before = moments.scatter_upper.copy()
    fit_subspace(moments, standardise=True)
    np.testing.assert_array_equal(moments.scatter_upper, before)


@pytest.mark.parametrize("threshold", [0.9, 0.999999, 0.99999999])
def test_whitened_rows_equal_the_svd_beside_outlier_dimensions(threshold: float):
    x = with_outlier_dimensions(rows(600, 40))
    U, s, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    subspace = fit(x, threshold)
    want = np.square(U[:, : subspace.k]).sum(axis=1)
    np.testing.assert_allclose(subspace.singular_values, s[: subspace.k], rtol=1e-9)
    np.testing.assert_allclose(scores(x, subspace), want, rtol=1e-6, atol=1e-6 * subspace.k / 600)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 60), d=st.integers(3, 30), seed=st.integers(0, 100), outliers=st.booleans())
def test_standardised_it_equals_the_svd_of_the_standardised_matrix(n, d, seed, outliers):
    x = with_outlier_dimensions(rows(n, d, seed)) if outliers else rows(n, d, seed)
    U, s, _ = np.linalg.svd((x - x.mean(axis=0)) / x.std(axis=0), full_matrices=False)
    subspace = fit(x, 0.95, standardise=True)
    np.testing.assert_allclose(subspace.scale, x.std(axis=0), rtol=1e-7)
    np.testing.assert_allclose(subspace.singular_values, s[: subspace.k], rtol=1e-6)
    assert subspace.spectrum.sum() == pytest.approx(n * d)
    if subspace.k == min(n - 1, d) or s[subspace.k] < 0.99 * s[subspace.k - 1]:
        want = np.square(U[:, : subspace.k]).sum(axis=1)
        np.testing.assert_allclose(scores(x, subspace), want, atol=1e-6)


def test_standardised_scores_ignore_the_units_of_every_column():
    x = rows(150, 8)
    units = np.geomspace(1e-4, 1e4, 8)
    want = scores(x, fit(x, standardise=True))
    np.testing.assert_allclose(scores(x * units, fit(x * units, standardise=True)), want, rtol=1e-9)


def test_without_standardising_the_scale_is_one_everywhere():
    np.testing.assert_array_equal(fit(rows(30, 4)).scale, np.ones(4))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 / 3])
def test_a_constant_column_keeps_scale_one_and_adds_no_rank(value: float):
    x = rows(900, 4)
    x[:, 2] = value
    moments = accumulate(np.array_split(x, 11), 4)
    subspace = fit_subspace(moments, EnergyThreshold(1.0), standardise=True)
    assert subspace.scale[2] == 1.0
    assert subspace.rank == 3
    assert subspace.spectrum.sum() == pytest.approx(3 * 900)

    # The same where the column varies by the rounding of its mean.
    rounded = moments.scatter()
    rounded[2, 2] = 900 * (100 * 2.2e-16 * value) ** 2
    noisy = Moments(900, moments.mean, rounded[np.triu_indices(4)])
    assert fit_subspace(noisy, standardise=True).scale[2] == 1.0


def test_the_whitening_turns_the_pool_into_orthonormal_columns():
    for standardise in (False, True):
        subspace = fit(with_outlier_dimensions(rows(300, 10)), 0.999, standardise=standardise)
        U = (with_outlier_dimensions(rows(300, 10)) - subspace.mean) @ subspace.whitening
        np.testing.assert_allclose(U.T @ U, np.eye(subspace.k), atol=1e-7)


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("x", [rows(50, 6), rows(1, 6)], ids=["k above 0", "k of 0"])
def test_a_round_trip_through_safetensors_is_exact(x: NDArray[np.float64], standardise: bool):
    subspace = fit(x, standardise=standardise)
    restored = Subspace.from_arrays(load(save(subspace.to_arrays())))
    assert restored.n == subspace.n
    assert type(restored.n) is int
    for name in ("mean", "scale", "directions", "singular_values", "spectrum"):
        np.testing.assert_array_equal(getattr(restored, name), getattr(subspace, name), err_msg=name)


def test_stored_arrays_that_contradict_each_other_are_refused():
    arrays = fit(rows(50, 6)).to_arrays()
    with pytest.raises(ValueError, match=r"'directions' of shape \(5, 4\)"):
        Subspace.from_arrays(arrays | {"directions": np.zeros((5, 4))})
    with pytest.raises(ValueError, match=r"'scale' of shape \(5,\)"):
        Subspace.from_arrays(arrays | {"scale": np.ones(5)})
    with pytest.raises(ValueError, match="1 energies"):
        Subspace.from_arrays(arrays | {"spectrum": np.ones(1)})
    with pytest.raises(ValueError, match="expected one named 'spectrum'"):
        Subspace.from_arrays({name: array for name, array in arrays.items() if name != "spectrum"})
