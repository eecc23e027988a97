"""Leverage from moments equals leverage from a full SVD, and behaves as leverage must."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scalselect_assets.method.subspace.basis import Subspace, fit_subspace
from scalselect_assets.method.subspace.leverage import (
    LeverageScorer,
    leverage_scores,
    projection_dtype,
    ranked,
)
from scalselect_assets.method.subspace.moments import Moments, NonFiniteError, accumulate
from scalselect_assets.method.subspace.rank import DEFAULT_ENERGY_THRESHOLD, EnergyThreshold, FixedRank
from tests.method.vectors import rows, with_outlier_dimensions


def published(x: NDArray[Any], threshold: float) -> tuple[NDArray[np.float64], int]:
    """Scores and k as the paper computes them: a full SVD of the centred matrix."""
    centred = x - x.mean(axis=0)
    U, s, _ = np.linalg.svd(centred, full_matrices=False)
    k = int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), threshold)) + 1
    return np.square(U[:, :k]).sum(axis=1), k


def scores(x: NDArray[Any], threshold: float = DEFAULT_ENERGY_THRESHOLD) -> NDArray[np.float64]:
    return leverage_scores(x, fit_subspace(Moments.of(x), EnergyThreshold(threshold)))


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.999])
@pytest.mark.parametrize(("n", "d"), [(700, 24), (300, 1), (30, 80), (2, 5)])
def test_scores_equal_the_svd(n: int, d: int, threshold: float):
    x = rows(n, d)
    want, k = published(x, threshold)
    subspace = fit_subspace(accumulate(np.array_split(x, 4), d), EnergyThreshold(threshold))
    assert subspace.k == k
    np.testing.assert_allclose(leverage_scores(x, subspace), want, rtol=1e-5, atol=1e-14)


@pytest.mark.parametrize("threshold", [0.9, 0.999999, 0.99999999])
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_the_svd_beside_outlier_dimensions(seed: int, threshold: float):
    x = with_outlier_dimensions(rows(900, 48, seed))
    want, k = published(x, threshold)
    subspace = fit_subspace(accumulate(np.array_split(x, 7), 48), EnergyThreshold(threshold))
    assert subspace.k == k
    # Relative to each score, but a score of nearly zero is compared with the mean score.
    np.testing.assert_allclose(leverage_scores(x, subspace), want, rtol=1e-6, atol=1e-6 * k / 900)


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 80),
    d=st.integers(1, 30),
    seed=st.integers(0, 100),
    threshold=st.sampled_from([0.3, 0.9, 0.9999]),
    outliers=st.booleans(),
)
def test_scores_lie_between_zero_and_one_and_sum_to_k(n, d, seed, threshold, outliers):
    x = rows(n, d + 3, seed)
    if outliers:
        x = with_outlier_dimensions(x)
    subspace = fit_subspace(Moments.of(x), EnergyThreshold(threshold))
    got = leverage_scores(x, subspace)
    assert got.shape == (n,)
    assert got.dtype == np.float64
    assert ((got >= 0) & (got <= 1)).all()
    assert got.sum() == pytest.approx(subspace.k, rel=1e-6)


@settings(deadline=None, max_examples=20)
@given(cuts=st.lists(st.integers(0, 90), max_size=5).map(sorted), order=st.permutations(range(90)))
def test_neither_shards_nor_order_change_a_score(cuts, order):
    x = with_outlier_dimensions(rows(90, 6))
    shards = np.split(x[list(order)], cuts)
    subspace = fit_subspace(accumulate(shards, 6), EnergyThreshold(0.99999))
    got = np.concatenate([leverage_scores(shard, subspace) for shard in shards])
    np.testing.assert_allclose(got, scores(x, 0.99999)[list(order)], rtol=1e-6)


def test_duplicates_score_alike_whatever_stands_beside_them_and_a_batch_scores_the_same_again():
    x = rows(1200, 300)
    x[[256, 700, 1199]] = x[3]
    subspace = fit_subspace(Moments.of(x))
    whole = leverage_scores(x, subspace)
    alone = [leverage_scores(x[3:end], subspace)[0] for end in (4, 5, 10, 67, 259, 260, 1000)]
    np.testing.assert_allclose([*whole[[3, 256, 700, 1199]], *alone], whole[3], rtol=1e-6)
    np.testing.assert_array_equal(leverage_scores(x, subspace), whole)


@pytest.mark.parametrize("decay", [0.3, 1.0, 1.3])
def test_float32_projections_are_within_1e_5_of_float64_in_every_row(decay: float):
    rng = np.random.default_rng(4)
    axes, _ = np.linalg.qr(rng.normal(size=(400, 400)))
    x = ((rng.normal(size=(3000, 400)) * np.arange(1, 401.0) ** -decay) @ axes).astype(np.float32)
    x[:, 5] += 1e4
    subspace = fit_subspace(Moments.of(x), EnergyThreshold(0.99))
    assert projection_dtype(subspace) is np.float32
    exact = np.square((x.astype(np.float64) - subspace.mean) @ subspace.whitening).sum(axis=1)
    np.testing.assert_allclose(leverage_scores(x, subspace), exact, rtol=1e-5)


def test_directions_too_far_apart_for_float32_are_projected_in_float64():
    rng = np.random.default_rng(4)
    axes, _ = np.linalg.qr(rng.normal(size=(200, 200)))
    x = (rng.normal(size=(2000, 200)) * np.r_[1e5, np.ones(199)]) @ axes
    subspace = fit_subspace(Moments.of(x), FixedRank(50))
    assert projection_dtype(subspace) is np.float64
    exact = np.square((x - subspace.mean) @ subspace.whitening).sum(axis=1)
    np.testing.assert_allclose(leverage_scores(x, subspace), exact, rtol=1e-9)


def test_the_papers_threshold_stays_in_float32_beside_a_strong_direction_in_4096_dimensions():
    # The last kept direction holds at least (1 - 0.9)/d of the energy: the largest ratio that there is.
    d = 4096
    energies = np.full(3687, 1.0)
    energies[0] = 0.1 * d
    subspace = Subspace(
        9999, np.zeros(d), np.ones(d), np.empty((d, 3687)), np.sqrt(energies), np.r_[energies, np.ones(409)]
    )
    assert projection_dtype(subspace) is np.float32
    widest = replace(subspace, singular_values=np.sqrt(np.r_[10.0 * d, energies[1:]]))
    assert projection_dtype(widest) is np.float32


def test_few_directions_are_projected_in_float64_since_single_rows_nearly_vanish_there():
    x = rows(4000, 128)
    subspace = fit_subspace(Moments.of(x), FixedRank(1))
    assert projection_dtype(subspace) is np.float64
    exact = np.square((x - subspace.mean) @ subspace.whitening).sum(axis=1)
    np.testing.assert_allclose(leverage_scores(x, subspace), exact, rtol=1e-8)


def test_a_torch_device_gives_the_same_scores():
    x = rows(700, 60).astype(np.float32)
    subspace = fit_subspace(Moments.of(x))
    on_torch = LeverageScorer(subspace, device="cpu:0").scores(x)  # any name but cpu is torch's
    np.testing.assert_allclose(on_torch, leverage_scores(x, subspace), rtol=1e-5)


def test_normalised_scores_average_one_and_stay_comparable_as_the_pool_grows():
    x = rows(4000, 12)
    means = []
    for pool in (x[:1000], x):
        scorer = LeverageScorer(fit_subspace(Moments.of(pool)))
        normalised = scorer.scores(pool) * scorer.normalisation
        assert normalised.mean() == pytest.approx(1, rel=1e-6)
        means.append(normalised[:1000].mean())
    assert means[1] == pytest.approx(1, abs=0.1)
    assert LeverageScorer(fit_subspace(Moments.of(np.ones((5, 3))))).normalisation == 0.0


def test_a_rare_direction_scores_highest():
    x = rows(500, 8) * np.array([1, 1, 1, 1, 1, 1, 1, 0])
    planted = [17, 401]
    x[planted, 7] = 200.0
    assert set(np.argsort(-scores(x))[:2]) == set(planted)


def test_dependent_and_constant_columns_change_no_score():
    x = rows(100, 3)
    isometric = np.column_stack([x[:, :2], x[:, 2] * 0.6, x[:, 2] * 0.8, np.full(100, 0.1)])
    np.testing.assert_allclose(scores(isometric, 1.0), scores(x, 1.0), rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 300])
def test_rows_without_any_difference_score_zero(n: int):
    np.testing.assert_array_equal(scores(np.full((n, 4), 1e6 / 3)), np.zeros(n))


def test_two_rows_share_the_only_direction():
    np.testing.assert_allclose(scores(np.array([[0.0, 1.0], [4.0, 4.0]])), [0.5, 0.5], rtol=1e-6)


def test_with_the_whole_rank_kept_scores_are_the_diagonal_of_the_hat_matrix():
    x = rows(60, 5)
    centred = x - x.mean(axis=0)
    got = scores(x, 1.0)
    np.testing.assert_allclose(got, np.diag(centred @ np.linalg.pinv(centred)), rtol=1e-5)
    assert got.sum() == pytest.approx(5)


def test_no_rows_have_no_scores():
    subspace = fit_subspace(Moments.of(rows(20, 3)))
    assert leverage_scores(np.empty((0, 3)), subspace).shape == (0,)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_narrow_rows_are_centred_in_float64(dtype: type[np.floating[Any]]):
    x = (rows(300, 10) + 50).astype(dtype)
    np.testing.assert_allclose(scores(x), published(x.astype(np.float64), 0.9)[0], rtol=1e-5)


def test_a_row_outside_the_fitted_pool_is_refused_by_its_number():
    x = rows(400, 4)
    subspace = fit_subspace(Moments.of(x))
    x[300] += 1e3
    with pytest.raises(ValueError, match=r"(?s)in row 300 .*400 rows of the basis.*Refit the basis"):
        leverage_scores(x, subspace)


def test_a_leverage_above_one_by_more_than_rounding_is_refused_and_by_less_is_one():
    """The row on the only axis: its leverage is the square of its place on it."""
    x = np.concatenate([np.zeros((2, 3)), [[1.0, 0, 0], [-1.0, 0, 0]]]) / np.sqrt(2)
    subspace = fit_subspace(Moments.of(x), EnergyThreshold(0.9))
    for above in (0.9e-4, 1e-9):
        row = np.array([[np.sqrt(1 + above), 0, 0]])
        assert leverage_scores(row, subspace) == [1.0]
    with pytest.raises(ValueError, match=r"Got leverage 1\.0001\d+ in row 0"):
        leverage_scores(np.array([[np.sqrt(1 + 1.1e-4), 0, 0]]), subspace)


def test_rounding_above_one_is_clipped():
    x = rows(50, 3)
    subspace = fit_subspace(Moments.of(x))
    direction = subspace.directions[:, 0] * subspace.singular_values[0]
    edge = subspace.mean + direction * np.array([[1 + 1e-5], [1 - 1e-5]])
    got = leverage_scores(edge, subspace)
    assert got[0] == 1.0
    assert 1 - 1e-4 < got[1] < 1.0


@settings(deadline=None)
@given(st.floats(min_value=1e-12, max_value=1e12), st.floats(min_value=-1, max_value=1))
def test_ranked_scores_are_as_near_as_scores_are_exact_and_keep_their_order(score: float, off: float) -> None:
    near = score * (1 + off * 1e-6)
    one, other = ranked(np.array([score, near]))
    assert abs(one - score) <= 4e-6 * score
    assert abs(one - other) <= 8e-6 * score  # at most one step apart
    assert (one <= other) or (near <= score)
    assert ranked(np.array([one])) == one


def test_ranked_scores_keep_zero_and_one_and_tell_apart_what_differs() -> None:
    assert ranked(np.array([0.0, 1.0, 0.5, 1 + 1e-4])).tolist()[:3] == [0.0, 1.0, 0.5]
    assert len(set(ranked(np.linspace(1, 1.001, 90)))) == 90


def test_most_copies_tie_once_their_scores_are_rounded_and_few_before() -> None:
    x = rows(4000, 24, seed=3).astype(np.float32)
    subspace = fit_subspace(Moments.of(x))
    noise = np.random.default_rng(0).normal(scale=1e-7, size=x.shape)
    one = leverage_scores(x, subspace)
    other = leverage_scores((x * (1 + noise)).astype(np.float32)[::-1], subspace)[::-1]
    assert np.mean(one == other) < 0.2
    assert np.mean(ranked(one) == ranked(other)) > 0.9


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("row", [0, 299, 599])
def test_a_non_finite_value_is_refused_by_its_row(row: int, value: float):
    x = rows(600, 3)
    subspace = fit_subspace(Moments.of(x))
    x[row, 1] = value
    with pytest.raises(NonFiniteError, match=rf"row {row} .*column 1"):
        leverage_scores(x, subspace)


def test_other_dimensions_are_refused_even_without_rows():
    subspace = fit_subspace(Moments.of(rows(20, 3)))
    for x in (np.zeros((5, 4)), np.empty((0, 4)), np.zeros(3)):
        with pytest.raises(ValueError, match=r"expected \(rows, 3\)"):
            leverage_scores(x, subspace)
