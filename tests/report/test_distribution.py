"""The distribution of leverage is that of the scores, whatever way they come."""

import numpy as np
import pytest

from scalselect_assets.report.distribution import LeverageCounts


def counted(*parts: np.ndarray) -> LeverageCounts:
    counts = LeverageCounts()
    for part in parts:
        counts.add(part)
    return counts


@pytest.fixture
def scores() -> np.ndarray:
    return np.random.default_rng(0).lognormal(-0.5, 1.5, 5000)


def test_bins_hold_the_samples_between_their_bounds(scores: np.ndarray) -> None:
    chosen = scores[scores > 2]
    bins = counted(scores).bins(counted(chosen))
    for one in bins:
        assert one.pool == np.sum((scores >= one.low) & (scores < one.high))
        assert one.selected == np.sum((chosen >= one.low) & (chosen < one.high))
    assert sum(one.pool for one in bins) == len(scores)
    assert [one.high for one in bins[:-1]] == [one.low for one in bins[1:]]
    assert bins[0].pool
    assert bins[-1].pool


def test_neither_order_nor_shards_change_anything(scores: np.ndarray) -> None:
    whole = counted(scores)
    parts = counted(*np.array_split(scores[::-1], 7), np.zeros(0))
    assert whole.n == parts.n == len(scores)
    assert whole.rank_curve() == parts.rank_curve()
    assert whole.bins(LeverageCounts()) == parts.bins(LeverageCounts())


@pytest.mark.parametrize("n", [1, 3, 5000])
def test_the_rank_curve_is_within_its_bound_of_the_sorted_scores(scores: np.ndarray, n: int) -> None:
    descending = np.sort(scores[:n])[::-1]
    ranks, values = counted(descending).rank_curve()
    exact = descending[np.array(ranks) - 1]
    assert np.all(np.array(values) <= exact)
    assert np.all(exact < np.array(values) * 2 ** (1 / 64))
    assert (ranks[0], ranks[-1]) == (1, n)
    assert list(ranks) == sorted(set(ranks))
    assert len(ranks) <= 160


def test_scores_of_nothing_and_beyond_the_grid_are_counted_too() -> None:
    counts = counted(np.array([0.0, 0.0, 1e-9, 1.0, 1e15]))
    bins = counts.bins(LeverageCounts())
    assert (bins[0].low, bins[0].pool) == (0.0, 3)
    assert (bins[-1].high, bins[-1].pool) == (float("inf"), 1)
    assert counts.rank_curve()[0] == (1, 2)
    assert counted(np.zeros(4)).rank_curve() == ((), ())
    assert LeverageCounts().bins(LeverageCounts()) == ()
