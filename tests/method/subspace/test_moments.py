"""The moments equal a direct computation however the rows are split, ordered or stored."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load, save

from scalselect_assets.method.subspace import moments as moments_module
from scalselect_assets.method.subspace.moments import Moments, MomentsAccumulator, NonFiniteError, accumulate


def rows(n: int, d: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(n, d)) + np.arange(d)


def assert_same(got: Moments, want: Moments, rtol: float = 1e-12) -> None:
    assert got.n == want.n
    np.testing.assert_allclose(got.mean, want.mean, rtol=rtol, atol=rtol)
    packed = want.scatter_upper
    np.testing.assert_allclose(got.scatter_upper, packed, rtol=rtol, atol=rtol * np.abs(packed).max())


def test_one_batch_equals_the_textbook_formulas():
    x = rows(50, 4)
    moments = Moments.of(x)
    assert (moments.n, moments.d) == (50, 4)
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(moments.scatter(), np.cov(x, rowvar=False) * 49, rtol=1e-12)


@settings(deadline=None, max_examples=25)
@given(
    cuts=st.lists(st.integers(0, 60), max_size=6).map(sorted),
    order=st.permutations(range(60)),
    seed=st.integers(0, 100),
)
def test_neither_the_split_into_batches_nor_the_order_of_rows_matters(cuts, order, seed):
    x = rows(60, 5, seed)
    batches = np.split(x[list(order)], cuts)
    assert_same(accumulate(batches, 5), Moments.of(x))


@settings(deadline=None, max_examples=25)
@given(sizes=st.tuples(*[st.integers(0, 20)] * 3), seed=st.integers(0, 100))
def test_merging_is_associative_and_commutative(sizes, seed):
    a, b, c = (Moments.of(rows(n, 3, seed + i) * 10**i) for i, n in enumerate(sizes))
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_same(a.merge(b), b.merge(a))


def test_merging_with_no_rows_changes_nothing_on_either_side():
    moments = Moments.of(rows(7, 3))
    for merged in (moments.merge(Moments.empty(3)), Moments.empty(3).merge(moments)):
        assert merged.n == 7
        np.testing.assert_array_equal(merged.mean, moments.mean)
        np.testing.assert_array_equal(merged.scatter(), moments.scatter())


def test_an_empty_stream_and_an_empty_batch_have_no_rows():
    for moments in (accumulate([], 3), accumulate([np.empty((0, 3))], 3), Moments.of(np.empty((0, 3)))):
        assert moments.n == 0
        np.testing.assert_array_equal(moments.scatter(), np.zeros((3, 3)))


def test_the_scatter_is_exactly_symmetric_after_batches_and_merges():
    scatter = accumulate(np.array_split(rows(500, 37), 7), 37).scatter()
    np.testing.assert_array_equal(scatter, scatter.T)


def test_a_spread_far_below_the_mean_survives():
    # 1e8 squared needs 1e16; a spread of 1 beside it has no digits left in an uncentred float64 sum.
    spread = rows(400, 2) - np.arange(2)
    got = accumulate(np.split(spread + 1e8, 8), 2)
    np.testing.assert_allclose(got.scatter(), np.cov(spread, rowvar=False) * 399, rtol=1e-7)


def test_columns_that_never_vary_have_exactly_no_scatter_over_many_batches():
    x = rows(90, 3)
    x[:, 1] = 0.1
    scatter = accumulate(np.array_split(x, 11), 3).scatter()
    np.testing.assert_array_equal(scatter[1], np.zeros(3))
    assert scatter[0, 0] > 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_narrow_rows_are_summed_in_float64(dtype: type[np.floating[Any]]):
    # Summed in float16 the mean stops growing at 2048 rows and the squares overflow.
    x = (rows(5000, 3) * 300).astype(dtype)
    moments = Moments.of(x)
    assert moments.mean.dtype == moments.scatter().dtype == np.float64
    assert_same(moments, Moments.of(x.astype(np.float64)), rtol=1e-14)
    exact = [math.fsum(map(float, column)) / 5000 for column in x.T]
    np.testing.assert_allclose(moments.mean, exact, rtol=1e-13)


@pytest.mark.parametrize(("n", "d"), [(9000, 7), (1500, 300), (40, 700), (1, 5), (2, 1)])
def test_more_rows_than_the_buffer_and_wider_than_a_tile_equal_one_product(n: int, d: int):
    x = rows(n, d, seed=n).astype(np.float32)
    centred = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    got = accumulate(np.array_split(x, 5), d).scatter()
    spread = np.sqrt(np.outer(np.square(centred).sum(0), np.square(centred).sum(0)))
    np.testing.assert_array_less(np.abs(got - centred.T @ centred), 1e-13 * spread + 1e-300)


@pytest.mark.parametrize("at", ["first", "last"])
def test_an_outlier_dimension_far_from_zero_keeps_its_digits_even_where_its_mean_moves(
    at: str, monkeypatch: pytest.MonkeyPatch
):
    # One column of scale 1e3 about 1e4, and a tenth of the rows a million away: the shift is wrong by far.
    monkeypatch.setattr(moments_module, "_BUFFER_ROWS", 64)
    x = np.random.default_rng(3).normal(size=(2000, 4))
    x[:, 1] = x[:, 1] * 1e3 + 1e4
    x[slice(0, 200) if at == "first" else slice(1800, 2000)] += 1e6
    got = accumulate(np.array_split(x, 9), 4).scatter()
    exact = x.astype(np.longdouble) - x.astype(np.longdouble).mean(axis=0)
    want = (exact.T @ exact).astype(np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_any_number_of_cores_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    x = rows(3000, 600)
    got = []
    for cores in (1, 3):
        monkeypatch.setattr(moments_module, "n_cores", lambda cores=cores: cores)
        got.append(Moments.of(x).scatter_upper)
    np.testing.assert_array_equal(*got)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("n_batches", [1, 3, 700])
def test_a_torch_device_gives_the_same_moments(dtype, n_batches):
    x = (100 * rows(700, 300)).astype(dtype)
    accumulator = MomentsAccumulator(300, device="cpu")
    on_torch = MomentsAccumulator(300, device="cpu:0")  # any name but cpu is torch's
    for one in (accumulator, on_torch):
        assert one.moments().n == 0
        for batch in np.array_split(x, n_batches):
            one.add(batch)
    assert_same(on_torch.moments(), accumulator.moments(), rtol=1e-12)


def test_equal_rows_have_exactly_no_scatter_on_a_torch_device():
    accumulator = MomentsAccumulator(5, device="cpu:0")
    accumulator.add(np.tile(np.float32([1e4, 0.1, -3, 7e-5, 0]), (50, 1)))
    assert not accumulator.moments().scatter_upper.any()


def test_a_torch_device_refuses_what_is_not_finite_by_its_name_and_its_number():
    accumulator = MomentsAccumulator(3, device="cpu:0")
    accumulator.add(rows(5, 3))
    x = rows(4, 3)
    x[2, 0] = np.nan
    with pytest.raises(NonFiniteError, match="nan in sample the-third, column 0"):
        accumulator.add(x, names=["a", "b", "the-third", "d"])
    accumulator = MomentsAccumulator(3, device="cpu:0")
    accumulator.add(rows(5, 3))
    with pytest.raises(NonFiniteError, match="row 7"):
        accumulator.add(x)


def test_moments_can_be_asked_for_midway():
    x = rows(100, 3)
    accumulator = MomentsAccumulator(3)
    assert accumulator.moments().n == 0
    for half in np.split(x, 2):
        accumulator.add(half)
        so_far = accumulator.moments()
    assert_same(so_far, Moments.of(x))


def test_a_non_finite_value_is_refused_by_its_name():
    accumulator = MomentsAccumulator(3)
    accumulator.add(rows(5, 3))
    x = rows(4, 3)
    x[2, 0] = np.inf
    with pytest.raises(NonFiniteError, match="inf in sample the-third, column 0"):
        accumulator.add(x, names=["a", "b", "the-third", "d"])


def test_the_input_is_left_as_it_was():
    x = rows(10, 3)
    before = x.copy()
    Moments.of(x)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_value_is_refused_by_its_row_in_the_batch(value: float):
    x = rows(9, 3)
    x[4, 2] = x[7, 0] = value
    with pytest.raises(NonFiniteError, match=rf"{value} in row 4 .*column 2"):
        Moments.of(x)


def test_a_non_finite_value_in_a_stream_is_refused_by_its_row_in_the_stream():
    x = rows(30, 3)
    x[23, 1] = np.nan
    with pytest.raises(NonFiniteError, match="row 23 "):
        accumulate(np.split(x, [10, 10, 20]), 3)


def test_other_dimensions_are_refused_with_both_numbers_and_a_remedy():
    with pytest.raises(ValueError, match=r"dimensions 3 and 4.*Recompute"):
        Moments.empty(3).merge(Moments.empty(4))
    with pytest.raises(ValueError, match=r"\(5, 4\); expected \(rows, 3\)"):
        accumulate([rows(5, 4)], 3)
    with pytest.raises(ValueError, match=r"\(5,\); expected \(rows, dimension\)"):
        Moments.of(np.zeros(5))
    with pytest.raises(ValueError, match="dimension 0"):
        Moments.empty(0)


@pytest.mark.parametrize("d", [1, 2, 17])
def test_a_round_trip_through_safetensors_is_exact_and_half_the_size(d: int):
    moments = accumulate(np.array_split(rows(40, d), 3), d)
    arrays = moments.to_arrays()
    assert arrays["scatter_upper"].shape == (d * (d + 1) // 2,)
    restored = Moments.from_arrays(load(save(arrays)))
    assert restored.n == moments.n
    assert type(restored.n) is int
    np.testing.assert_array_equal(restored.mean, moments.mean)
    np.testing.assert_array_equal(restored.scatter_upper, moments.scatter_upper)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scatter_upper", np.zeros(5), r"'scatter_upper' of shape \(5,\).*expected shape \(6\)"),
        ("mean", np.zeros((3, 1)), r"'mean' of shape \(3, 1\)"),
        ("mean", np.zeros(3, dtype=np.float32), "dtype float32; .*dtype float64"),
        ("n", np.zeros(2, dtype=np.int64), r"'n' of shape \(2,\)"),
    ],
)
def test_stored_arrays_of_another_shape_or_dtype_are_refused(name: str, value: NDArray[Any], message: str):
    with pytest.raises(ValueError, match=message):
        Moments.from_arrays(Moments.of(rows(4, 3)).to_arrays() | {name: value})


def test_a_missing_stored_array_is_refused_by_name():
    arrays = Moments.of(rows(4, 3)).to_arrays()
    del arrays["scatter_upper"]
    with pytest.raises(ValueError, match=r"\['mean', 'n'\]; expected one named 'scatter_upper'"):
        Moments.from_arrays(arrays)
