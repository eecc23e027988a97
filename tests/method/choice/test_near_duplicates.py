"""The removal rule: what goes, what stays and for whom, whatever the order of reading and the blocks."""

import numpy as np
import pytest
from numpy.typing import NDArray

from scalselect_assets.method.choice.near_duplicates import centred_directions, near_duplicates, pairs_within
from scalselect_assets.method.subspace.preprocessing import unit_rows
from tests.method.vectors import VectorsInMemory

COSINE = 0.98


def on_circle(*degrees: float) -> VectorsInMemory:
    angles = np.radians(degrees)
    return VectorsInMemory(np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))


def clustered(n: int, d: int = 24, seed: int = 3) -> NDArray[np.float32]:
    """Rows around a few dozen centres, some near enough to be duplicates and some not."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(40, d))
    spread = rng.uniform(0, 0.4, (n, 1))
    return unit_rows(centres[rng.integers(0, 40, n)] + spread * rng.normal(size=(n, d))).astype(np.float32)


def naive(matrix: NDArray[np.float32], order: NDArray[np.int64], cosine: float) -> list[int]:
    """The rule as it is said, one row after the other."""
    partner = [-1] * len(matrix)
    kept: list[int] = []
    for row in order:
        near = [k for k in kept if round(float(matrix[row].astype(float) @ matrix[k]), 6) >= cosine]
        if near:
            partner[row] = near[0]
        else:
            kept.append(row)
    return partner


def test_a_removed_row_removes_nothing() -> None:
    # 0° stays, 10° goes for it; 20° is within 11.5° of 10° only, and stays.
    removals = near_duplicates(np.array([0, 1, 2]), on_circle(0, 10, 20), COSINE)
    assert removals.partner.tolist() == [-1, 0, -1]
    assert removals.cosine[1] == pytest.approx(np.cos(np.radians(10)), abs=1e-6)
    assert np.isnan(removals.cosine[[0, 2]]).all()


def test_the_best_of_a_neighbourhood_stays_and_the_first_of_several_is_the_partner() -> None:
    vectors = on_circle(0, 10, 20)
    assert near_duplicates(np.array([1, 0, 2]), vectors, COSINE).partner.tolist() == [1, -1, 1]
    assert near_duplicates(np.array([2, 0, 1]), vectors, COSINE).partner.tolist() == [-1, 2, -1]


@pytest.mark.parametrize("block_rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("cosine", [0.5, 0.9, 0.98, 1.0])
def test_it_is_the_rule_for_any_size_of_block(block_rows: int, cosine: float) -> None:
    matrix = clustered(300)
    matrix[250:] = matrix[:50]
    order = np.random.default_rng(1).permutation(300)
    removals = near_duplicates(order, VectorsInMemory(matrix), cosine, block_rows=block_rows)
    assert removals.partner.tolist() == naive(matrix, order, cosine)
    assert (~removals.kept).any()


def test_the_result_does_not_depend_on_where_rows_are_kept() -> None:
    matrix, order = clustered(200), np.random.default_rng(2).permutation(200)
    moved = np.random.default_rng(3).permutation(200)  # position i holds what was at moved[i]
    back = np.argsort(moved)
    here = near_duplicates(order, VectorsInMemory(matrix), 0.9, block_rows=32)
    there = near_duplicates(back[order], VectorsInMemory(matrix[moved]), 0.9, block_rows=32)
    assert np.array_equal(there.kept[back], here.kept)
    gone = np.flatnonzero(~here.kept)
    assert np.array_equal(moved[there.partner[back[gone]]], here.partner[gone])
    assert np.array_equal(there.cosine[back[gone]], here.cosine[gone])


def test_no_two_kept_rows_are_near_and_every_partner_is_kept_and_better() -> None:
    matrix, order = clustered(500), np.random.default_rng(4).permutation(500)
    removals = near_duplicates(order, VectorsInMemory(matrix), 0.9, block_rows=100)
    kept, gone = np.flatnonzero(removals.kept), np.flatnonzero(~removals.kept)
    assert len(kept) + len(gone) == 500
    products = matrix[kept].astype(float) @ matrix[kept].T
    assert (products[~np.eye(len(kept), dtype=bool)] < 0.9).all()
    rank = np.argsort(order)
    assert removals.kept[removals.partner[gone]].all()
    assert (rank[removals.partner[gone]] < rank[gone]).all()
    assert (removals.cosine[gone] >= 0.9).all()


def test_no_rows_and_one_row_are_kept() -> None:
    assert len(near_duplicates(np.empty(0, np.int64), on_circle(), COSINE).partner) == 0
    assert near_duplicates(np.array([0]), on_circle(30), COSINE).kept.tolist() == [True]


@pytest.mark.parametrize("cosine", [0.0, -1.0, 1.01, float("nan")])
def test_a_threshold_out_of_range_is_refused(cosine: float) -> None:
    with pytest.raises(ValueError, match=r"lies in \(0, 1\]"):
        near_duplicates(np.array([0]), on_circle(0), cosine)


def test_an_order_that_misses_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="does not hold each position from 0 to 2 once"):
        near_duplicates(np.array([0, 1, 1]), on_circle(0, 1, 2), COSINE)


def test_directions_are_told_from_the_mean_and_not_from_the_origin() -> None:
    rng = np.random.default_rng(6)
    x = (1000 + rng.normal(size=(50, 16))).astype(np.float32)
    raw = VectorsInMemory(unit_rows(x).astype(np.float32))
    order = np.arange(50)
    assert near_duplicates(order, raw, 0.995).kept.sum() == 1
    mean = x.mean(axis=0, dtype=np.float64)
    centred = centred_directions(x, mean, np.ones(16), to_unit_length=False)
    assert near_duplicates(order, VectorsInMemory(centred), 0.995).kept.all()
    assert np.allclose(np.linalg.norm(centred, axis=1), 1)


def test_a_row_that_is_the_mean_has_no_direction_and_repeats_nothing() -> None:
    mean = np.array([1000.0, -3.0, 20.0])
    x = np.stack([mean, mean * (1 + 1e-8), mean + 1.0]).astype(np.float32)
    directions = centred_directions(x, mean, np.ones(3), to_unit_length=False)
    assert directions[:2].tolist() == [[0.0] * 3] * 2
    assert near_duplicates(np.arange(3), VectorsInMemory(directions), 0.5).kept.all()


def test_directions_are_those_of_the_subspaces_own_geometry() -> None:
    rng = np.random.default_rng(7)
    x = rng.normal(3, [1, 5, 0.2], (20, 3))
    unit = unit_rows(x)
    scale = unit.std(axis=0)
    got = centred_directions(x, unit.mean(axis=0), scale, to_unit_length=True)
    assert np.allclose(got, unit_rows((unit - unit.mean(axis=0)) / scale), atol=1e-6)


def test_pairs_are_those_of_the_definition() -> None:
    matrix = clustered(80)
    vectors, queries = VectorsInMemory(matrix), matrix[[4, 9]]
    want = [
        [query, row]
        for query in range(2)
        for row in range(80)
        if round(float(queries[query].astype(float) @ matrix[row]), 6) >= 0.9
    ]
    assert pairs_within(queries, vectors.near(queries, 0.9), 0.9).tolist() == want
    assert [0, 4] in want
    assert [1, 9] in want
