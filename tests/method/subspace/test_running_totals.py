"""Totals that shards enter and leave equal the moments of the shards that are in them, to the last digits."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scalselect_assets.method.subspace.moments import Moments
from scalselect_assets.method.subspace.running_totals import RunningMoments


def shard(seed: int, n: int = 30, d: int = 6, scale: float = 1.0) -> Moments:
    rng = np.random.default_rng(seed)
    return Moments.of((rng.normal(size=(n, d)) + rng.normal(size=d)) * scale)


def merged(shards: list[Moments]) -> Moments:
    total = Moments.empty(shards[0].d)
    for one in shards:
        total = total.merge(one)
    return total


def running(shards: list[Moments]) -> RunningMoments:
    totals = RunningMoments(shards[0].mean)
    for one in shards:
        totals.add(one)
    return totals


def assert_same(got: Moments, want: Moments, rtol: float = 1e-13) -> None:
    assert got.n == want.n
    np.testing.assert_allclose(got.mean, want.mean, rtol=rtol, atol=rtol)
    size = np.abs(want.scatter_upper).max()
    np.testing.assert_allclose(got.scatter_upper, want.scatter_upper, rtol=rtol, atol=rtol * size)


def test_shards_put_in_equal_shards_merged():
    shards = [shard(seed, n) for seed, n in enumerate([30, 1, 500])]
    assert_same(running(shards).moments(), merged(shards))


@settings(deadline=None, max_examples=40)
@given(steps=st.lists(st.integers(0, 5), max_size=40))
def test_any_history_of_changes_ends_where_its_shards_are(steps: list[int]):
    shards = [shard(seed, scale=10.0**seed) for seed in range(6)]
    totals, inside = RunningMoments(shards[2].mean), set[int]()
    for step in steps:
        (totals.remove if step in inside else totals.add)(shards[step])
        inside ^= {step}
    if inside:
        assert_same(totals.moments(), merged([shards[i] for i in sorted(inside)]), rtol=1e-12)
    else:
        assert totals.moments().n == 0


def test_a_shard_of_wild_values_leaves_no_trace_when_it_is_taken_out():
    # In plain float64 it would leave an error of 1e-16 of its own 1e20, ten thousand times the rest.
    good, wild = [shard(1), shard(2)], shard(3, scale=1e10)
    totals = running(good)
    before = totals.moments()
    totals.add(wild)
    totals.remove(wild)
    assert_same(totals.moments(), before, rtol=1e-11)


def test_ten_thousand_changes_add_up_to_no_drift():
    shards = [shard(seed) for seed in range(3)]
    totals = running(shards)
    before = totals.moments()
    for turn in range(10_000):
        totals.remove(shards[turn % 3])
        totals.add(shards[turn % 3])
    np.testing.assert_allclose(totals.moments().scatter_upper, before.scatter_upper, rtol=1e-15)


def test_an_outlier_dimension_far_from_the_reference_keeps_its_digits():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 4))
    x[:, 1] = x[:, 1] * 1e3 + 1e4
    first, rest = x[:100] + np.array([0, 5e4, 0, 0]), x[100:]
    totals = running([Moments.of(first), Moments.of(rest)])
    totals.remove(Moments.of(first))
    assert_same(totals.moments(), Moments.of(rest), rtol=1e-14)


@pytest.mark.parametrize("reference", [0.0, 1e6, -1e9])
def test_the_point_that_the_totals_are_about_does_not_matter(reference: float):
    x = np.random.default_rng(0).normal(size=(500, 4)) + 1e4
    totals = RunningMoments(np.full(4, reference))
    for part in np.split(x, 5):
        totals.add(Moments.of(part))
    # The shards' own means are rounded at 1e-12, which is 1e-12 of a spread of 1.
    assert_same(totals.moments(), Moments.of(x), rtol=1e-11)


def test_shards_without_rows_change_nothing():
    totals = running([shard(0)])
    before = totals.moments()
    totals.add(Moments.empty(6))
    totals.remove(Moments.empty(6))
    np.testing.assert_array_equal(totals.moments().scatter_upper, before.scatter_upper)


def test_a_round_trip_through_arrays_is_exact():
    totals = running([shard(0), shard(1, scale=1e6)])
    restored = RunningMoments.from_arrays(totals.to_arrays())
    for name, array in totals.to_arrays().items():
        np.testing.assert_array_equal(restored.to_arrays()[name], array)
    restored.remove(shard(1, scale=1e6))
    assert_same(restored.moments(), shard(0))


@pytest.mark.parametrize(
    ("name", "value"), [("total", np.zeros(6)), ("gram_upper", np.zeros((2, 5))), ("n", np.zeros(2))]
)
def test_stored_totals_of_another_shape_are_refused(name: str, value: NDArray[Any]):
    with pytest.raises(ValueError, match=f"{name!r} of shape"):
        RunningMoments.from_arrays(running([shard(0)]).to_arrays() | {name: value})


def test_taking_out_more_than_there_is_or_another_dimension_is_refused():
    totals = running([shard(0, n=5)])
    with pytest.raises(ValueError, match=r"30 rows to take out of 5.*Rebuild"):
        totals.remove(shard(1, n=30))
    with pytest.raises(ValueError, match="dimensions 3 and 6"):
        totals.add(shard(0, d=3))
