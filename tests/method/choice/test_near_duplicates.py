"""The removal rule: what goes, what stays and for whom, whatever the order of reading and the blocks."""

import numpy as np
import pytest
from numpy.typing import NDArray

from scalselect_assets.method.choice.near_duplicates import (
    Contents,
    centred_directions,
    near_duplicates,
    pairs_within,
)
from scalselect_assets.method.choice.nearest_cosines import LEAST_SUGGESTED, nearest_cosines
from scalselect_assets.method.choice.text_likeness import Shingles, TextLikeness, shingles
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


def said(texts: list[str], pictures: list[int], least: float = 0.9) -> Contents:
    """Rows that show numbered pictures and ask a text each."""
    hashed = Shingles.of([shingles(text.split()) for text in texts])
    return Contents(np.array(pictures), TextLikeness(hashed, hashed), least)


def naive_with_contents(
    matrix: NDArray[np.float32], order: NDArray[np.int64], cosine: float, contents: Contents
) -> list[int]:
    partner = [-1] * len(matrix)
    kept: list[int] = []
    for row in order:
        for other in kept:
            near = round(float(matrix[row].astype(float) @ matrix[other]), 6) >= cosine
            pair = np.array([row]), np.array([other])
            alike = contents.likeness(*pair)[0] >= contents.least_likeness
            if alike and (near or contents.pictures[row] == contents.pictures[other]):
                partner[row] = other
                break
        else:
            kept.append(row)
    return partner


def test_another_question_about_the_same_picture_stays() -> None:
    vectors = on_circle(0, 1, 2, 3)
    contents = said(["red cup", "blue box", "red cup", "red cup"], [0, 0, 0, 1])
    removals = near_duplicates(np.arange(4), vectors, COSINE, contents=contents)
    assert removals.partner.tolist() == [-1, -1, 0, 0]
    assert removals.spared.tolist() == [False, True, False, False]
    assert near_duplicates(np.arange(4), vectors, COSINE).partner.tolist() == [-1, 0, 0, 0]


def test_the_same_picture_with_a_like_text_goes_however_far_its_vector() -> None:
    vectors = on_circle(0, 90, 180)
    contents = said(["red cup", "red cup", "red cup"], [0, 0, 1])
    assert near_duplicates(np.arange(3), vectors, COSINE, contents=contents).partner.tolist() == [-1, 0, -1]


@pytest.mark.parametrize("block_rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("cosine", [0.5, 0.9])
def test_with_contents_it_is_the_rule_for_any_size_of_block(block_rows: int, cosine: float) -> None:
    matrix, rng = clustered(300), np.random.default_rng(8)
    texts = [f"{word} cup" for word in rng.choice(["red", "blue", "green"], 300)]
    contents = said(texts, rng.integers(0, 60, 300).tolist())
    order = rng.permutation(300)
    removals = near_duplicates(
        order, VectorsInMemory(matrix), cosine, contents=contents, block_rows=block_rows
    )
    assert removals.partner.tolist() == naive_with_contents(matrix, order, cosine, contents)
    assert (~removals.kept).any()
    assert removals.kept[removals.spared].all()


@pytest.mark.parametrize("least", [0.0, 1.1, float("nan")])
def test_a_likeness_out_of_range_is_refused(least: float) -> None:
    with pytest.raises(ValueError, match="allowed is above 0 and at most 1"):
        said(["a"], [0], least)


def test_the_suggested_threshold_is_above_the_neighbours_that_are_no_copies() -> None:
    rng = np.random.default_rng(9)
    matrix = unit_rows(rng.normal(size=(400, 12))).astype(np.float32)
    copies = unit_rows(matrix[:50] + 0.01 * rng.normal(size=(50, 12))).astype(np.float32)
    both = np.concatenate([matrix, copies])
    contents = said([f"q{i % 400}" for i in range(450)], [i % 400 for i in range(450)])
    rows = np.arange(400)
    batches = [(np.arange(a, a + 90), both[a : a + 90]) for a in range(0, 450, 90)]
    found = nearest_cosines(rows, both[:400], batches, contents)
    cosines = both[:400].astype(float) @ both.T
    cosines[rows, rows] = -1
    assert np.allclose(found.nearest, cosines.max(axis=1), atol=1e-5)
    cosines[rows[:50], 400 + rows[:50]] = -1
    assert np.allclose(found.innocent, cosines.max(axis=1), atol=1e-5)
    assert (found.nearest[:50] > 0.99).all()
    assert np.mean(found.innocent >= found.suggested()) <= 0.01


def test_one_row_suggests_the_lowest_threshold() -> None:
    one = on_circle(0)
    found = nearest_cosines(np.array([0]), one.matrix, [(np.array([0]), one.matrix)], said(["a"], [0]))
    assert found.suggested() == LEAST_SUGGESTED
