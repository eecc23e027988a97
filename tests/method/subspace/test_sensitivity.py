"""What another rank would choose."""

import numpy as np
import pytest

from scalselect_assets.method.subspace.basis import principal_axes
from scalselect_assets.method.subspace.leverage import leverage_scores
from scalselect_assets.method.subspace.moments import Moments
from scalselect_assets.method.subspace.sensitivity import rank_alternatives


def pool(n: int = 400) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 12)) * np.geomspace(1, 0.1, 12)


def test_overlaps_are_those_of_choosing_by_the_scores_of_each_rank():
    x = pool()
    axes = principal_axes(Moments.of(x))
    got = rank_alternatives(x, axes.subspace(9), 4, {"fewer": 2, "same": 4, "more": 9}, 64)
    chosen = {
        k: set(np.argsort(-leverage_scores(x, axes.subspace(k)), kind="stable")[:64]) for k in (2, 4, 9)
    }
    assert [(one.rule, one.k) for one in got] == [("fewer", 2), ("same", 4), ("more", 9)]
    for one in got:
        assert one.overlap == len(chosen[4] & chosen[one.k]) / 64
    assert got[1].overlap == 1.0
    assert 0 < got[0].overlap < 1


def test_rows_without_any_difference_choose_alike_at_rank_zero():
    x = np.ones((10, 3))
    (only,) = rank_alternatives(x, principal_axes(Moments.of(x)).subspace(0), 0, {"energy": 0}, 2)
    assert (only.k, only.overlap) == (0, 1.0)


@pytest.mark.parametrize("size", [0, 401])
def test_more_rows_than_there_are_or_none_are_refused(size: int):
    axes = principal_axes(Moments.of(pool()))
    with pytest.raises(ValueError, match=f"Got {size} of 400 rows"):
        rank_alternatives(pool(), axes.subspace(3), 3, {}, size)
