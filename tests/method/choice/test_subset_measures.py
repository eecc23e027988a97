"""Measures of a subset equal their definitions on whole matrices, and tell good subsets from bad ones."""

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from scalselect_assets.method.choice.agreement import agree
from scalselect_assets.method.choice.candidates import Labels, projected
from scalselect_assets.method.choice.choose import choose
from scalselect_assets.method.choice.strategies import Random, Spanning, TopLeverage
from scalselect_assets.method.choice.subset_measures import (
    label_coverage,
    near_duplicate_rate,
    own_subspace_measures,
    shared_share,
    span_measures,
)
from scalselect_assets.method.choice.terms import Budget
from scalselect_assets.method.subspace.basis import fit_subspace
from scalselect_assets.method.subspace.moments import Moments
from scalselect_assets.method.subspace.rank import EnergyThreshold
from tests.method.pools import blocks_of, of_rows, planted
from tests.method.vectors import rows, with_outlier_dimensions


def chosen_of(n: int, size: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(n)[:size]


def test_span_measures_equal_their_definitions():
    x = rows(120, 8)
    subspace = fit_subspace(Moments.of(x), EnergyThreshold(0.97))
    u, chosen = projected(x, subspace), chosen_of(120, 30)
    got = span_measures(blocks_of(u, 17), chosen, 120, subspace.singular_values)
    eigenvalues = np.linalg.eigvalsh(u[chosen].T @ u[chosen]) * 120 / 30
    k = subspace.k
    assert got.leverage_share == pytest.approx(np.square(u[chosen]).sum() / k)
    assert got.n_directions == k
    assert got.energy_contained == 1.0
    assert got.smallest_eigenvalue == pytest.approx(eigenvalues[0])
    assert got.mean_log_eigenvalue == pytest.approx(np.log(eigenvalues).mean())


def test_the_whole_pool_spans_itself_evenly():
    x = rows(50, 6)
    subspace = fit_subspace(Moments.of(x))
    got = span_measures(blocks_of(projected(x, subspace)), np.arange(50), 50, subspace.singular_values)
    assert (got.leverage_share, got.energy_contained) == (pytest.approx(1), 1.0)
    assert got.smallest_eigenvalue == pytest.approx(1)
    assert got.mean_log_eigenvalue == pytest.approx(0, abs=1e-9)


def test_fewer_rows_than_directions_contain_the_energy_of_their_span():
    x = rows(60, 8)
    subspace = fit_subspace(Moments.of(x), EnergyThreshold(1.0))
    u, chosen = projected(x, subspace), chosen_of(60, 3)
    got = span_measures(blocks_of(u), chosen, 60, subspace.singular_values)
    coordinates = u * subspace.singular_values
    basis, _ = np.linalg.qr(coordinates[chosen].T)
    assert got.n_directions == 3
    assert got.energy_contained == pytest.approx(
        np.square(coordinates @ basis).sum() / np.square(coordinates).sum()
    )
    assert got.smallest_eigenvalue == 0
    assert got.mean_log_eigenvalue == -np.inf


def test_repeating_a_direction_contains_less_energy_than_spreading():
    u = np.repeat(np.eye(4), 5, axis=0) / np.sqrt(5)
    strengths = np.array([4.0, 3.0, 2.0, 1.0])
    repeated = span_measures(blocks_of(u), np.array([0, 1, 2]), 20, strengths)
    spread = span_measures(blocks_of(u), np.array([0, 5, 10]), 20, strengths)
    assert repeated.energy_contained == pytest.approx(16 / 30)
    assert spread.energy_contained == pytest.approx(29 / 30)
    assert repeated.leverage_share == spread.leverage_share
    assert (repeated.n_directions, spread.n_directions) == (1, 3)


@pytest.mark.parametrize("standardise", [False, True])
def test_own_subspace_measures_equal_those_of_whole_matrices(standardise: bool):
    x = with_outlier_dimensions(rows(150, 7)) if standardise else rows(150, 7)
    pool = Moments.of(x)
    subspace = fit_subspace(pool, EnergyThreshold(0.9), standardise=standardise)
    chosen = chosen_of(150, 20)
    got = own_subspace_measures(pool, Moments.of(x[chosen]), subspace)
    scaled = (x - x.mean(axis=0)) / (x.std(axis=0) if standardise else 1.0)
    own = scaled[chosen] - scaled[chosen].mean(axis=0)
    k = subspace.k
    v_own, v = (np.linalg.svd(matrix)[2][:k].T for matrix in (own, scaled))
    assert got.energy_captured == pytest.approx(
        np.square(scaled @ v_own).sum() / np.square(scaled @ v).sum(), rel=1e-8
    )
    lost = scaled - scaled @ v_own @ v_own.T
    assert got.projection_error == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(scaled), rel=1e-6)


def test_the_pool_itself_captures_all_of_its_energy():
    x = rows(100, 6)
    pool = Moments.of(x)
    subspace = fit_subspace(pool)
    got = own_subspace_measures(pool, pool, subspace)
    assert got.energy_captured == pytest.approx(1)
    assert got.projection_error == pytest.approx(np.sqrt(1 - subspace.energy))


def test_a_subset_of_fewer_rows_than_directions_uses_its_own_rank():
    x = rows(100, 6)
    pool = Moments.of(x)
    subspace = fit_subspace(pool, EnergyThreshold(1.0))
    centred, few = x - x.mean(axis=0), x[:3] - x[:3].mean(axis=0)
    plane = np.linalg.svd(few)[2][:2].T
    three = own_subspace_measures(pool, Moments.of(x[:3]), subspace)
    assert three.energy_captured == pytest.approx(np.square(centred @ plane).sum() / np.square(centred).sum())
    one = own_subspace_measures(pool, Moments.of(x[:1]), subspace)
    assert (one.energy_captured, one.projection_error) == (0, 1)


def test_spanning_represents_the_weakest_direction_best_where_groups_are_planted():
    u, _ = planted([300, 150, 80, 40, 20, 10, 8, 6, 4, 4, 3, 3], 6)
    pool = of_rows(u)
    terms = agree(pool, Budget(24))
    even = {
        kind.__name__: span_measures(
            blocks_of(u), choose(pool, kind(), terms, blocks_of(u)).rows, pool.n, np.ones(u.shape[1])
        ).mean_log_eigenvalue
        for kind in (Spanning, TopLeverage, Random)
    }
    assert even["Spanning"] > even["TopLeverage"]
    assert even["Spanning"] > even["Random"]


def test_coverage_is_the_share_of_the_labels_in_the_pool_that_are_chosen():
    assert label_coverage(Labels.of(list("aaaabbbccd")), np.array([0, 1, 4, 7])) == 0.75
    assert label_coverage(Labels(np.array([0, 0, 2]), ("a", "b", "c")), np.array([0])) == 0.5


def by_definition(x: NDArray[np.float64], threshold: float) -> float:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -1)
    return float((cosines.max(axis=1) >= threshold).mean())


@pytest.mark.parametrize("block", [1, 7, 4096])
@pytest.mark.parametrize("queries", [1, 10, 2048])
def test_near_duplicates_are_those_of_all_pairs(block: int, queries: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("scalselect_assets.method.choice.subset_measures._QUERY_ROWS", queries)
    x, _ = planted([5, 4, 3, 2, 1, 1, 1, 1, 1, 1, 1, 1], 6, noise=0.4)
    for threshold in (0.5, 0.9, 0.97):
        got = near_duplicate_rate(blocks_of(x, block), len(x), threshold=threshold)
        assert got == by_definition(x, threshold)
    rates = [near_duplicate_rate(blocks_of(x), len(x), threshold=t) for t in (0.5, 0.9, 0.97)]
    assert rates[0] > rates[1] > rates[2]


def test_equal_rows_are_near_at_a_cosine_of_one_and_rows_of_zeros_are_not():
    x = np.array([[0.1, 0.3], [0.1, 0.3], [0.7, -0.1], [0.0, 0.0], [0.0, 0.0]])
    assert near_duplicate_rate(blocks_of(x), 5, threshold=1.0) == 0.4


def test_a_sample_of_rows_is_compared_with_all():
    x, _ = planted([2] * 300 + [1] * 400, 40, noise=1e-6)
    assert near_duplicate_rate(blocks_of(x), len(x), threshold=0.9999) == 0.6
    estimates = [
        near_duplicate_rate(blocks_of(x), len(x), threshold=0.9999, exact_up_to=500, sample=200, seed=seed)
        for seed in range(20)
    ]
    standard_error = np.sqrt(0.6 * 0.4 / 200 * (1 - 200 / len(x)))
    assert all(abs(rate - 0.6) < 4 * standard_error for rate in estimates)
    assert len(set(estimates)) > 1
    again = near_duplicate_rate(blocks_of(x), len(x), threshold=0.9999, exact_up_to=500, sample=200, seed=7)
    assert again == estimates[7]


def test_near_duplicates_hold_no_more_than_some_blocks():
    def stream():
        return (np.full((500, 400), float(i % 3 - 1)) for i in range(40))

    tracemalloc.start()
    near_duplicate_rate(stream, 20_000, threshold=0.9, exact_up_to=0, sample=100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000 * 400 * 8 / 4


def test_what_two_choices_share_is_a_share_of_the_first():
    none = np.array([], dtype=np.int64)
    assert shared_share(np.array([1, 2, 3, 4]), np.array([5, 4, 3])) == 0.5
    assert shared_share(np.array([5, 4, 3]), np.array([1, 2, 3, 4])) == pytest.approx(2 / 3)
    assert shared_share(np.array([7, 2]), np.array([2, 7])) == 1
    assert (shared_share(np.array([1]), none), shared_share(none, np.array([1]))) == (0, 1)


def test_what_is_no_choice_is_refused():
    u = np.eye(3)
    for chosen, message in (([], "0 chosen rows"), ([0, 0], "2 chosen rows, 1 of them"), ([3], "0 of them")):
        with pytest.raises(ValueError, match=message):
            span_measures(blocks_of(u), np.array(chosen, dtype=np.int64), 3, np.ones(3))
        with pytest.raises(ValueError, match=message):
            label_coverage(Labels.of("abc"), np.array(chosen, dtype=np.int64))
    with pytest.raises(ValueError, match="width 3 with 2 singular values"):
        span_measures(blocks_of(u), np.array([0]), 3, np.ones(2))
    with pytest.raises(ValueError, match="2 rows in the first choice, 1 of them distinct"):
        shared_share(np.array([1, 1]), np.array([2]))
    with pytest.raises(ValueError, match="cosine 0"):
        near_duplicate_rate(blocks_of(u), 3, threshold=0)
    with pytest.raises(ValueError, match="3 rows in the blocks for 4"):
        near_duplicate_rate(blocks_of(u), 4, threshold=0.9)
    with pytest.raises(ValueError, match="0 rows and a sample"):
        near_duplicate_rate(blocks_of(u), 0, threshold=0.9)
