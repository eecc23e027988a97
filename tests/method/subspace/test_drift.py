"""The drift bounds what really happens to the scores, and is nothing where nothing happened."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scalselect_assets.method.subspace.basis import Subspace, fit_subspace
from scalselect_assets.method.subspace.drift import Drift, basis_drift
from scalselect_assets.method.subspace.moments import Moments
from scalselect_assets.method.subspace.rank import EnergyThreshold, FixedRank
from tests.method.vectors import rows, with_outlier_dimensions


def fit(x: NDArray[np.float64], threshold: float = 0.9, *, standardise: bool = False) -> Subspace:
    return fit_subspace(Moments.of(x), EnergyThreshold(threshold), standardise=standardise)


def normalised_scores(x: NDArray[np.float64], subspace: Subspace) -> NDArray[np.float64]:
    """n/k · leverage of rows that need not be in the pool."""
    leverage = np.square((x - subspace.mean) @ subspace.whitening).sum(axis=1)
    return leverage * (subspace.n / max(subspace.k, 1))


def mean_change(old: Subspace, new: Subspace, x: NDArray[np.float64]) -> float:
    return float(np.abs(normalised_scores(x, new) - normalised_scores(x, old)).mean())


def assert_nothing_changed(drift: Drift) -> None:
    assert drift.score_change == pytest.approx(0, abs=1e-12)
    assert drift.largest_angle == pytest.approx(0, abs=1e-9)
    assert drift.energy_kept == pytest.approx(1, abs=1e-12)


def in_raw_units(old: Subspace, new: Subspace, moments: Moments) -> float:
    """The bound tr(|D| C) + 2 √(δᵀ P C P δ) + δᵀ P δ, from the d x d matrices themselves."""

    def form(subspace: Subspace) -> NDArray[np.float64]:
        return subspace.whitening @ subspace.whitening.T * (subspace.n / subspace.k)

    P, C, delta = form(old), moments.scatter() / moments.n, new.mean - old.mean
    values, vectors = np.linalg.eigh(form(new) - P)
    absolute = (vectors * np.abs(values)) @ vectors.T
    return float(np.sum(absolute * C) + 2 * np.sqrt(delta @ P @ C @ P @ delta) + delta @ P @ delta)


@settings(deadline=None, max_examples=80)
@given(
    n=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    d=st.integers(3, 20),
    seeds=st.tuples(st.integers(0, 50), st.integers(0, 50)),
    thresholds=st.tuples(st.sampled_from([0.3, 0.9, 0.9999]), st.sampled_from([0.3, 0.9, 0.9999])),
    outliers=st.booleans(),
    standardise=st.tuples(st.booleans(), st.booleans()),
    shift=st.sampled_from([0.0, 0.1, 10.0]),
)
def test_no_pool_changes_its_mean_score_by_more(n, d, seeds, thresholds, outliers, standardise, shift):
    a, b = rows(n[0], d, seeds[0]), rows(n[1], d, seeds[1]) + shift
    if outliers:
        a, b = with_outlier_dimensions(a), with_outlier_dimensions(b)
    old = fit(a, thresholds[0], standardise=standardise[0])
    new = fit(b, thresholds[1], standardise=standardise[1])
    drift = basis_drift(old, new, Moments.of(b))
    change = mean_change(old, new, b)
    assert change <= drift.score_change * (1 + 1e-6) + 1e-9
    assert 0 <= drift.largest_angle <= 90
    assert 0 <= drift.energy_kept <= 1


@settings(deadline=None, max_examples=30)
@given(n=st.integers(30, 80), grown=st.integers(0, 40), d=st.integers(3, 12), seed=st.integers(0, 100))
def test_the_bound_is_never_above_the_one_in_raw_units(n, grown, d, seed):
    x = rows(n + grown, d, seed)
    old, new, moments = fit(x[:n]), fit(x), Moments.of(x)
    assert basis_drift(old, new, moments).score_change <= in_raw_units(old, new, moments) + 1e-9


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.999])
def test_an_equal_basis_has_not_drifted(threshold: float, standardise: bool):
    x = with_outlier_dimensions(rows(300, 24))
    subspace = fit(x, threshold, standardise=standardise)
    assert_nothing_changed(basis_drift(subspace, subspace, Moments.of(x)))
    flipped = replace(subspace, directions=-subspace.directions)
    assert_nothing_changed(basis_drift(flipped, subspace, Moments.of(x)))


def test_a_rotation_among_equally_strong_directions_is_no_drift():
    x = np.concatenate([np.eye(6), -np.eye(6)]) * np.array([3, 3, 3, 1, 1, 1])
    new = fit_subspace(Moments.of(x), FixedRank(3))
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    old = replace(new, directions=new.directions @ rotation)
    assert_nothing_changed(basis_drift(old, new, Moments.of(x)))


def test_the_same_rows_twice_are_no_drift():
    x = rows(90, 7)
    doubled = np.concatenate([x, x])
    drift = basis_drift(fit(x), fit(doubled), Moments.of(doubled))
    assert drift.score_change == pytest.approx(0, abs=1e-9)
    assert drift.energy_kept == pytest.approx(1)


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5])
def test_for_a_grown_pool_the_bound_is_within_a_factor_of_the_change(share: float, outliers: bool):
    x = rows(4000, 32)
    if outliers:
        x = with_outlier_dimensions(x)
    before = round(4000 * (1 - share))
    old, new = (fit_subspace(Moments.of(part), FixedRank(12)) for part in (x[:before], x))
    drift = basis_drift(old, new, Moments.of(x))
    change = mean_change(old, new, x)
    assert change <= drift.score_change <= 6 * change


def test_rows_in_a_new_direction_are_seen():
    rng = np.random.default_rng(0)
    x = rows(500, 10)
    added = x[:100] + 60 * rng.normal(size=(100, 1)) * np.linalg.qr(rng.normal(size=(10, 1)))[0].T
    grown = np.concatenate([x, added])
    little = basis_drift(fit(x), fit(np.concatenate([x, x[:100]])), Moments.of(np.concatenate([x, x[:100]])))
    much = basis_drift(fit(x), fit(grown), Moments.of(grown))
    assert much.score_change > 10 * little.score_change
    assert much.largest_angle > 3 * little.largest_angle
    assert much.energy_kept < little.energy_kept


def test_a_shift_of_the_mean_alone_is_seen_by_the_scores_and_not_by_the_angles():
    x = rows(400, 6)
    moved = x + 0.5 * x.std(axis=0)
    old, new = fit(x), fit(moved)
    drift = basis_drift(old, new, Moments.of(moved))
    assert 0.05 < mean_change(old, new, moved) <= drift.score_change
    assert drift.largest_angle == pytest.approx(0, abs=1e-6)
    assert drift.energy_kept == pytest.approx(1)


def test_the_angles_equal_scipys():
    a, b = rows(200, 15, 1), rows(200, 15, 2)
    for old_k, new_k in ((4, 4), (3, 7), (7, 3)):
        old, new = (fit_subspace(Moments.of(x), FixedRank(k)) for x, k in ((a, old_k), (b, new_k)))
        want = np.degrees(scipy.linalg.subspace_angles(old.directions, new.directions))
        drift = basis_drift(old, new, Moments.of(b))
        assert drift.largest_angle == pytest.approx(want.max(), abs=1e-6)


def test_the_energy_kept_is_that_of_the_new_directions_inside_the_old_span():
    # New energies 9 and 1 along axes 0 and 1; the old span holds axis 1 only.
    old_x = np.concatenate([np.eye(3)[1:2], -np.eye(3)[1:2]])
    new_x = np.concatenate([np.diag([3.0, 1, 0]), -np.diag([3.0, 1, 0])])
    old, new = fit(old_x, 1.0), fit(new_x, 1.0)
    drift = basis_drift(old, new, Moments.of(new_x))
    assert drift.energy_kept == pytest.approx(0.1)
    assert drift.largest_angle == pytest.approx(0, abs=1e-9)  # one angle: the old direction is still there


@pytest.mark.parametrize(
    ("old_empty", "new_empty", "want"),
    [
        (True, True, Drift(0.0, 0.0, 1.0)),
        (True, False, Drift(1.0, 90.0, 0.0)),
    ],
)
def test_an_empty_old_basis_scored_every_row_zero(old_empty: bool, new_empty: bool, want: Drift):
    empty, x = np.full((5, 4), 2.0), rows(50, 4)
    new_x = empty if new_empty else x
    got = basis_drift(fit(empty if old_empty else x), fit(new_x), Moments.of(new_x))
    for name in ("score_change", "largest_angle", "energy_kept"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), abs=1e-9), name


def test_an_empty_new_basis_takes_every_score_away():
    x, empty = rows(50, 4), np.full((5, 4), 2.0)
    old, new = fit(x), fit(empty)
    drift = basis_drift(old, new, Moments.of(empty))
    assert drift.score_change == pytest.approx(mean_change(old, new, empty))
    assert (drift.largest_angle, drift.energy_kept) == (90.0, 1.0)


def test_other_dimensions_are_refused_with_a_remedy():
    x, y = rows(20, 3), rows(20, 4)
    with pytest.raises(ValueError, match=r"dimensions 3 and 4 .*score the pool again"):
        basis_drift(fit(x), fit(y), Moments.of(y))
    with pytest.raises(ValueError, match=r"moments of dimension 4"):
        basis_drift(fit(x), fit(x), Moments.of(y))


def test_the_moments_of_another_pool_are_refused():
    x = rows(20, 3)
    for other in (x[:19], x + 1):
        with pytest.raises(ValueError, match=r"was not fitted on.*Fit the basis on these moments"):
            basis_drift(fit(x), fit(x), Moments.of(other))


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_the_bound_is_the_change_itself_where_a_pool_only_spreads_or_shrinks(factor: float):
    """All of it moves in one sense, so that nothing is lost in the bound."""
    x = rows(500, 6)
    old = fit_subspace(Moments.of(x))
    centred = factor * (x - x.mean(axis=0)) + x.mean(axis=0)  # about the same mean, so that none is shifted
    new, moments = fit_subspace(Moments.of(centred)), Moments.of(centred)
    assert basis_drift(old, new, moments).score_change == pytest.approx(abs(factor**2 - 1), rel=1e-6)


def test_the_bound_is_nearly_the_change_itself_where_a_pool_is_shifted_a_little():
    """Of rows at -1 and 1, a shift by 0.01 changes the scores by 0.02 each, up and down."""
    x = np.array([[-1.0], [1.0]] * 50)
    old, new, moments = fit_subspace(Moments.of(x)), fit_subspace(Moments.of(x + 0.01)), Moments.of(x + 0.01)
    assert basis_drift(old, new, moments).score_change == pytest.approx(0.02, rel=0.01)
