"""The N-th largest of a stream is that of all its scores sorted, while the scores are never held."""

import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scalselect_assets.method.choice import top_n
from scalselect_assets.method.choice.top_n import Threshold, nth_largest

SMALLEST = 5e-324  # the least subnormal
LARGEST = np.finfo(np.float64).max


class Stream:
    """The same chunks at every pass, and how many passes were made."""

    def __init__(self, *chunks: list[float] | NDArray[np.float64]):
        self.chunks = [np.asarray(chunk, np.float64) for chunk in chunks]
        self.n_passes = 0

    def __call__(self) -> Iterator[NDArray[np.float64]]:
        self.n_passes += 1
        return iter(self.chunks)


def by_sorting(scores: NDArray[np.float64], size: int) -> Threshold:
    value = np.sort(scores)[len(scores) - size]
    n_above, n_at = int((scores > value).sum()), int((scores == value).sum())
    return Threshold(float(value), size, n_above, n_at, len(scores))


def in_chunks(scores: NDArray[np.float64], *cuts: int) -> Stream:
    return Stream(*np.split(scores, sorted(cuts)))


@pytest.fixture(params=[1 << 20, 3, 0], ids=["collects_early", "collects_late", "never_collects"])
def collect_at_most(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(top_n, "_COLLECT_AT_MOST", request.param)
    return int(request.param)


# Few distinct values make ties; neighbours share all digits but the last; floats reach every magnitude.
scores_to_rank = st.lists(
    st.one_of(
        st.sampled_from([0.0, -0.0, SMALLEST, 0.25, 0.5, 1.0, LARGEST]),
        st.integers(0, 4).map(lambda step: 0.25 + step * 2.0**-54),
        st.floats(min_value=0.0, allow_infinity=False, allow_nan=False),
    ),
    min_size=1,
    max_size=60,
)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), scores=scores_to_rank, limit=st.sampled_from([0, 1, 5, 1 << 20]))
def test_any_scores_in_any_chunks_give_what_sorting_gives(data, scores, limit):
    array = np.array(scores)
    size = data.draw(st.integers(1, len(scores)), "size")
    cuts = data.draw(st.lists(st.integers(0, len(scores)), max_size=8), "cuts")
    block = data.draw(st.integers(1, 20), "block")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_n, "_COLLECT_AT_MOST", limit)
        patch.setattr(top_n, "_BLOCK", block)
        stream = in_chunks(array, *cuts)
        got = nth_largest(stream, size)
    assert got == by_sorting(array, size)
    assert got.n_above < size <= got.n_above + got.n_at
    assert 1 <= got.n_ties_taken <= got.n_at
    assert stream.n_passes <= 4


@settings(deadline=None, max_examples=100)
@given(data=st.data(), scores=scores_to_rank)
def test_neither_order_nor_chunking_changes_the_threshold(data, scores):
    size = data.draw(st.integers(1, len(scores)), "size")
    shuffled = data.draw(st.permutations(scores), "shuffled")
    one_by_one = Stream(*([score] for score in shuffled))
    assert nth_largest(one_by_one, size) == nth_largest(Stream(scores), size)


@pytest.mark.parametrize("size", [1, 2, 160_000, 500_000, 999_999, 1_000_000])
def test_a_million_leverage_scores_give_what_sorting_gives(size: int, collect_at_most: int):
    scores = np.random.default_rng(0).beta(2, 800, 1_000_000)
    assert nth_largest(in_chunks(scores, 1, 300_000, 300_000, 777_777), size) == by_sorting(scores, size)


@pytest.mark.parametrize("size", [1, 500, 1000])
@pytest.mark.parametrize("value", [0.0, SMALLEST, 0.25, 1.0, LARGEST])
def test_equal_scores_are_all_ties(value: float, size: int, collect_at_most: int):
    stream = in_chunks(np.full(1000, value), 0, 10, 10, 999)
    assert nth_largest(stream, size) == Threshold(value, size, n_above=0, n_at=1000, n=1000)
    assert stream.n_passes == (2 if collect_at_most >= 1000 else 4)


def test_more_ties_than_may_be_collected_are_counted_in_four_passes():
    n = (1 << 20) + 1
    stream = in_chunks(np.full(n, 0.25), 7, n // 2)
    assert nth_largest(stream, 5) == Threshold(0.25, 5, n_above=0, n_at=n, n=n)
    assert stream.n_passes == 4


def test_ties_across_chunks_are_counted_together(collect_at_most: int):
    got = nth_largest(Stream([0.5, 0.25], [], [0.5], [0.75, 0.5]), 3)
    assert got == Threshold(0.5, 3, n_above=1, n_at=3, n=5)
    assert got.n_ties_taken == 2


@pytest.mark.parametrize("around", [SMALLEST * 3, 2.0**-1022, 2.0**-10, 0.3, 1.0, 2.0**1000])
def test_neighbours_in_the_last_bit_are_told_apart(around: float, collect_at_most: int):
    below, above = np.nextafter(around, 0.0), np.nextafter(around, np.inf)
    scores = np.array([below, above, around, above, below, around, below])
    for size in range(1, 8):
        assert nth_largest(in_chunks(scores, 3), size) == by_sorting(scores, size)


def test_scores_on_either_side_of_every_digit_of_their_bits_are_told_apart(collect_at_most: int):
    edges = np.array([1 << shift for shift in (15, 31, 47, 52, 62)], np.uint64)
    keys = np.concatenate([edges - np.uint64(1), edges, edges + np.uint64(1)])
    scores = np.random.default_rng(0).permutation(keys.view(np.float64))
    for size in range(1, len(scores) + 1):
        assert nth_largest(in_chunks(scores, 4, 9), size) == by_sorting(scores, size)


def test_zero_and_minus_zero_are_the_same_score(collect_at_most: int):
    got = nth_largest(Stream([-0.0, 0.5], [0.0, -0.0]), 2)
    assert got == Threshold(0.0, 2, n_above=1, n_at=3, n=4)
    assert np.signbit(got.value) == np.False_


def test_subnormal_scores_are_ranked_above_zero(collect_at_most: int):
    scores = np.array([0.0, SMALLEST, 2 * SMALLEST, 2.0**-1022 - SMALLEST, 2.0**-1022, -0.0])
    for size in range(1, 7):
        assert nth_largest(in_chunks(scores, 2), size) == by_sorting(scores, size)


def test_the_scores_are_only_read():
    scores = np.array([0.5, -0.0, 0.25])
    scores.flags.writeable = False
    nth_largest(Stream(scores), 2)
    assert np.signbit(scores[1])


def test_a_strided_column_of_scores_is_read_in_its_own_order():
    scores = np.random.default_rng(0).random((1000, 3))
    assert nth_largest(Stream(scores[:, 1], scores[::-1, 2]), 77) == by_sorting(scores[:, 1:].ravel(), 77)


@pytest.mark.parametrize("collect_limit", [1000, 0])
def test_memory_does_not_grow_with_the_stream(collect_limit: int, monkeypatch: pytest.MonkeyPatch):
    n_chunks, chunk_size = 200, 20_000

    def passes() -> Iterator[NDArray[np.float64]]:
        for seed in range(n_chunks):
            yield np.random.default_rng(seed).random(chunk_size)

    monkeypatch.setattr(top_n, "_COLLECT_AT_MOST", collect_limit)
    nth_largest(passes, 1)  # whatever is only ever allocated once is not counted below
    tracemalloc.start()
    try:
        got = nth_largest(passes, n_chunks * chunk_size // 2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert got.n == n_chunks * chunk_size
    assert peak < 4 << 20  # the scores are 30.5 MiB


def test_a_stream_that_has_grown_is_refused_without_being_held(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(top_n, "_COLLECT_AT_MOST", 100_000)
    chunk = np.full(10_000, 0.25)

    def grown() -> Callable[[], Iterator[NDArray[np.float64]]]:
        n_chunks = iter([10, 200])  # the second pass finds twenty times what the first has counted
        return lambda: iter([chunk] * next(n_chunks))

    tracemalloc.start()
    try:
        with pytest.raises(RuntimeError, match=r"Got 2000000 scores"):
            nth_largest(grown(), 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20  # the scores of the second pass are 15.3 MiB


@pytest.mark.parametrize("chunks", [[], [[]], [[], []]])
def test_an_empty_stream_is_refused(chunks: list[list[float]]):
    with pytest.raises(ValueError, match=r"Got size 1 with 0 scores; allowed is at most 0"):
        nth_largest(Stream(*chunks), 1)


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_below_one_is_refused_before_anything_is_read(size: int):
    stream = Stream([0.5])
    with pytest.raises(ValueError, match=rf"Got size {size}; allowed is 1"):
        nth_largest(stream, size)
    assert stream.n_passes == 0


def test_a_size_above_the_number_of_scores_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"Got size 4 with 3 scores; allowed is at most 3"):
        nth_largest(Stream([0.5], [0.25, 0.0]), 4)


@pytest.mark.parametrize("score", [np.nan, -np.nan, np.inf, -np.inf, -1e-12, -SMALLEST, -1.0])
def test_a_score_that_no_sample_can_have_is_refused_with_its_place(
    score: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(top_n, "_BLOCK", 2)
    with pytest.raises(
        ValueError, match=rf"Got score {score} at position 3 of chunk 2.*finite scores from 0"
    ):
        nth_largest(Stream([0.5], [], [-0.0, 0.25, 0.5, score, score]), 1)


@pytest.mark.parametrize(
    "chunk", [np.ones(3, np.float32), np.ones(3, np.int64), np.ones((3, 1)), np.ones(())]
)
def test_a_chunk_of_another_shape_or_dtype_is_refused(chunk: NDArray[np.float64]):
    with pytest.raises(ValueError, match=r"Got chunk 1 of shape .* allowed is one dimension of float64"):
        nth_largest(lambda: iter([np.ones(2), chunk]), 1)


@pytest.mark.parametrize(
    "later",
    [
        pytest.param([0.5, 0.25], id="fewer"),
        pytest.param([0.5, 0.25, 0.25, 0.25], id="more"),
        pytest.param([], id="none"),
        pytest.param([0.5, 0.5, 0.25], id="as many, fewer near the threshold"),
        pytest.param([0.25, 0.25, 0.25], id="as many, more near the threshold"),
    ],
)
def test_other_scores_in_the_second_pass_are_refused(later: list[float], collect_at_most: int):
    seen = iter([[0.5, 0.25, 0.25], later])
    with pytest.raises(RuntimeError, match=r"an earlier pass .*saw 3 and 2; .*fresh iterator at each call"):
        nth_largest(lambda: iter([np.array(next(seen))]), 2)


@pytest.mark.parametrize("n_unchanged", [1, 2, 3])
def test_other_scores_in_any_later_pass_are_refused(n_unchanged: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(top_n, "_COLLECT_AT_MOST", 0)
    seen = iter([[0.5, 0.25]] * n_unchanged + [[0.5, 0.25, 0.0]])
    with pytest.raises(RuntimeError, match=r"Got 3 scores, 1 of them near the threshold"):
        nth_largest(lambda: iter([np.array(next(seen))]), 2)


def test_an_iterator_that_is_used_up_is_refused():
    used_up = iter([np.array([0.5, 0.25])])
    with pytest.raises(RuntimeError, match=r"Got 0 scores.*saw 2.*fresh iterator"):
        nth_largest(lambda: used_up, 1)
