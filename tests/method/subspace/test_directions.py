"""Where leverage comes from, and what is alike: against the SVD and against plain loops."""

import numpy as np
import pytest

from scalselect_assets.method.subspace.basis import Subspace, fit_subspace
from scalselect_assets.method.subspace.directions import (
    centred_cosines,
    coordinates,
    strongest_directions,
    variance_between,
)
from scalselect_assets.method.subspace.leverage import leverage_scores
from scalselect_assets.method.subspace.moments import accumulate
from scalselect_assets.method.subspace.rank import FixedRank


@pytest.fixture
def x() -> np.ndarray:
    generator = np.random.default_rng(0)
    strengths = np.geomspace(10, 0.1, 12)
    return (5 + generator.standard_normal((2500, 12)) * strengths).astype(np.float32)


def fitted(x: np.ndarray, k: int, *, standardise: bool = False) -> Subspace:
    return fit_subspace(accumulate([x], x.shape[1]), FixedRank(k), standardise=standardise)


def test_coordinates_are_the_rows_of_u(x: np.ndarray) -> None:
    subspace = fitted(x, 4)
    u, _, vt = np.linalg.svd(x.astype(np.float64) - x.mean(0, dtype=np.float64), full_matrices=False)
    signs = np.sign((vt[:4] * subspace.directions.T).sum(1))
    np.testing.assert_allclose(coordinates(subspace, x), u[:, :4] * signs, atol=1e-9)
    np.testing.assert_array_equal(
        coordinates(subspace, x, np.array([2, 0])), coordinates(subspace, x)[:, [2, 0]]
    )


@pytest.mark.parametrize("n_marked", [1, 300, 2499])
def test_the_variance_between_marked_rows_and_others_is_that_of_their_means(
    n_marked: int, x: np.ndarray
) -> None:
    u = coordinates(fitted(x, 4), x)
    marked, others = u[:n_marked], u[n_marked:]
    between = n_marked * marked.mean(0) ** 2 + len(others) * others.mean(0) ** 2
    for side in (marked, others):
        found = variance_between(side.sum(0), n_marked, len(u))
        np.testing.assert_allclose(found, between / np.square(u).sum(0), rtol=1e-5)


def test_a_direction_that_only_tells_the_marked_rows_apart_is_all_of_their_difference() -> None:
    x = np.array([[1.0]] * 30 + [[-2.0]] * 15)
    u = coordinates(fitted(x, 1), x)
    assert variance_between(u[:30].sum(0), 30, 45) == pytest.approx(1.0)


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_the_shares_of_all_directions_sum_to_one_and_their_squares_to_the_leverage(
    k: int, standardise: bool, x: np.ndarray
) -> None:
    subspace = fitted(x, k, standardise=standardise)
    found = strongest_directions(subspace, x, n=k)
    np.testing.assert_allclose(found.share.sum(1), 1, rtol=1e-12)
    expected = leverage_scores(x.astype(np.float64), subspace)
    tolerance = 1e-9 if k < 8 else 1e-5  # from 8 directions on, scores are projected in float32
    np.testing.assert_allclose(np.square(found.coordinate).sum(1), expected, rtol=tolerance)
    np.testing.assert_allclose(found.share * expected[:, None], found.coordinate**2, rtol=tolerance)
    assert (np.sort(found.direction, axis=1) == np.arange(1, k + 1)).all()


def test_the_strongest_come_first_and_are_those_of_all(x: np.ndarray) -> None:
    subspace = fitted(x, 6)
    every, three = strongest_directions(subspace, x, n=6), strongest_directions(subspace, x)
    assert (np.diff(every.share, axis=1) <= 0).all()
    for name in ("direction", "share", "coordinate"):
        np.testing.assert_array_equal(getattr(three, name), getattr(every, name)[:, :3])


def test_a_planted_row_stands_out_along_its_own_direction(x: np.ndarray) -> None:
    x = x.copy()
    x[7] = x.mean(0)
    x[7, 11] -= 400
    found = strongest_directions(fitted(x, 3), x[7:8], n=2)
    planted = int(np.abs(fitted(x, 3).directions[11]).argmax())
    assert found.direction[0, 0] == planted + 1
    assert found.share[0, 0] > 0.99
    assert np.sign(found.coordinate[0, 0]) == -np.sign(fitted(x, 3).directions[11, planted])


def test_a_row_at_the_mean_has_no_strongest_direction_and_no_likeness(x: np.ndarray) -> None:
    subspace = fitted(x, 3)
    mean = subspace.mean[None]
    np.testing.assert_array_equal(strongest_directions(subspace, mean).share, [[0, 0, 0]])
    np.testing.assert_array_equal(centred_cosines(subspace, mean, x[0]), [0])
    np.testing.assert_array_equal(centred_cosines(subspace, x[:5], subspace.mean), [0] * 5)


def test_an_empty_subspace_has_no_directions(x: np.ndarray) -> None:
    assert strongest_directions(fitted(np.ones((5, 12)), 2), x[:4]).direction.shape == (4, 0)


def test_less_than_one_direction_is_refused(x: np.ndarray) -> None:
    with pytest.raises(ValueError, match="Got 0 directions"):
        strongest_directions(fitted(x, 3), x, n=0)
    with pytest.raises(ValueError, match="11"):
        strongest_directions(fitted(x, 3), x[:, :11])


@pytest.mark.parametrize("standardise", [False, True])
def test_cosines_are_those_of_the_centred_rows(standardise: bool, x: np.ndarray) -> None:
    subspace = fitted(x, 3, standardise=standardise)
    centred = (x.astype(np.float64) - subspace.mean) / subspace.scale
    expected = [float(row @ centred[3] / np.sqrt((row @ row) * (centred[3] @ centred[3]))) for row in centred]
    found = centred_cosines(subspace, x, x[3])
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found[3] == pytest.approx(1)
    assert np.abs(found).max() <= 1
