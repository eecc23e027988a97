"""Rows of unit length."""

import numpy as np

from scalselect_assets.method.subspace.preprocessing import unit_rows


def test_rows_have_length_one_and_keep_their_direction():
    x = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    unit = unit_rows(x)
    assert unit.dtype == np.float64
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-15)
    np.testing.assert_allclose(unit * np.linalg.norm(x.astype(float), axis=1, keepdims=True), x, rtol=1e-14)


def test_a_row_of_zeros_stays_one_and_no_rows_stay_none():
    np.testing.assert_array_equal(unit_rows(np.array([[0.0, 0.0], [3.0, 4.0]])), [[0, 0], [0.6, 0.8]])
    assert unit_rows(np.empty((0, 3))).shape == (0, 3)
