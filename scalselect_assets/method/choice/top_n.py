"""The N-th largest of a stream of scores, exactly, where the scores do not fit in memory."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_DIGIT_BITS = 16
_COLLECT_AT_MOST = 1 << 20  # scores held at once: 8 MiB
# A mask and a shifted copy of this many keys stay in the cache; those of a chunk of millions would not.
_BLOCK = 1 << 17
# Keys are the bits of a score. Everything from this one on is infinite, not a number, or has the sign bit.
_INFINITY_KEY = np.uint64(0x7FF0_0000_0000_0000)
_MINUS_ZERO_KEY = np.uint64(1 << 63)


@dataclass(frozen=True, slots=True)
class Threshold:
    """The lower end of the `size` largest of `n` scores: all above `value` and some of those equal to it.

    `n_above < size <= n_above + n_at`. All counts are of scores in the stream.
    """

    value: float  # the size-th largest score; 0.0 also where the stream has -0.0
    size: int
    n_above: int  # scores > value: all are taken
    n_at: int  # scores == value: n_ties_taken of them are taken
    n: int

    @property
    def n_ties_taken(self) -> int:
        """The number of the `n_at` scores equal to `value` that belong to the `size` largest; at least 1."""
        return self.size - self.n_above


def nth_largest(passes: Callable[[], Iterable[NDArray[np.float64]]], size: int) -> Threshold:
    """The `size`-th largest of all scores in a stream that is read several times and never held.

    Radix selection: as unsigned integers, the bits of non-negative doubles have the order of the doubles. A
    pass counts the scores by 16 bits and keeps the range of keys that holds the N-th; the next pass counts
    within it, or collects it once at most 2^20 scores are left. The result is exact for any scores, and the
    same for any order and chunking of them.

    Costs 2 passes up to 2^20 scores, 2 or 3 for a billion, and never more than 4, which it takes only if more
    than 2^20 scores are within a relative 2^-20 of the N-th. O(n) time per pass. Memory, whatever n is: at
    most 2^20 scores (8 MiB), 6 MiB of counters and scratch, and the chunk that is read.

    Args:
        passes: Gives a fresh iterable over the same scores at each call, as float64 chunks of shape (m,),
            m >= 0, finite and >= 0. Chunks are only read.
        size: N, from 1 to the number of scores.

    Raises:
        ValueError: `size` is out of range, or a chunk has another shape or dtype or an inadmissible score.
        RuntimeError: The counts show that a later pass read other scores than the first.
    """
    if size < 1:
        raise ValueError(f"Got size {size}; allowed is 1 up to the number of scores. Take at least one.")
    lowest, bits = 0, 63  # the N-th is one of the keys [lowest, lowest + 2**bits); the sign bit is 0 in all
    counts, n = _histogram(passes(), lowest, bits)
    if size > n:
        raise ValueError(
            f"Got size {size} with {n} scores; allowed is at most {n}. Lower the size or add scores."
        )
    n_above = 0
    while True:
        counts_from_top = np.cumsum(counts[::-1])
        bucket = len(counts) - 1 - int(np.searchsorted(counts_from_top, size - n_above))
        n_at = int(counts[bucket])
        n_above += int(counts[bucket + 1 :].sum())
        bits = _finer(bits)
        lowest += bucket << bits
        if bits == 0:
            return Threshold(_score(lowest), size, n_above, n_at, n)
        if n_at <= _COLLECT_AT_MOST:
            break
        counts, n_now = _histogram(passes(), lowest, bits)
        _check_unchanged((n, n_at), (n_now, int(counts.sum())))

    keys, n_now, n_at_now = _collect(passes(), lowest, bits, n_at)
    _check_unchanged((n, n_at), (n_now, n_at_now))
    nth = n_at - (size - n_above)
    keys.partition(nth)
    return Threshold(
        value=_score(int(keys[nth])),
        size=size,
        n_above=n_above + int(np.count_nonzero(keys > keys[nth])),
        n_at=int(np.count_nonzero(keys == keys[nth])),
        n=n,
    )


def _histogram(
    chunks: Iterable[NDArray[np.float64]], lowest: int, bits: int
) -> tuple[NDArray[np.int64], int]:
    """Counts of the keys in [lowest, lowest + 2**bits) by their next digit, and the number of all keys."""
    finer = _finer(bits)
    counts = np.zeros(1 << (bits - finer), np.int64)
    n = 0
    for keys in _blocks_of_keys(chunks):
        digits = _offsets_inside(keys, lowest, bits) >> np.uint64(finer)
        # bincount takes no uint64; digits are small, so that their bits mean the same as int64.
        found = np.bincount(digits.view(np.int64))
        counts[: len(found)] += found
        n += len(keys)
    return counts, n


def _collect(
    chunks: Iterable[NDArray[np.float64]], lowest: int, bits: int, n_expected: int
) -> tuple[NDArray[np.uint64], int, int]:
    """The keys in [lowest, lowest + 2**bits), how many keys there were at all, and how many in that range.

    Never holds more than `n_expected` keys, even if the stream has changed and there are more.
    """
    collected = np.zeros(n_expected, np.uint64)
    n, n_inside = 0, 0
    for keys in _blocks_of_keys(chunks):
        offsets = _offsets_inside(keys, lowest, bits)
        room = max(0, n_expected - n_inside)
        collected[n_inside : n_inside + len(offsets)] = offsets[:room]
        n_inside += len(offsets)
        n += len(keys)
    collected += np.uint64(lowest)
    return collected, n, n_inside


def _blocks_of_keys(chunks: Iterable[NDArray[np.float64]]) -> Iterator[NDArray[np.uint64]]:
    """The bits of every score, validated, with those of 0.0 for -0.0; never empty, at most `_BLOCK` long.

    No arithmetic on the scores: a process that flushes subnormals to zero gets the same keys.
    """
    for index, chunk in enumerate(chunks):
        if chunk.ndim != 1 or chunk.dtype != np.float64:
            raise ValueError(
                f"Got chunk {index} of shape {chunk.shape} and dtype {chunk.dtype}; allowed is one dimension "
                "of float64. Flatten and convert the scores before they are compared."
            )
        for start in range(0, len(chunk), _BLOCK):
            keys = chunk[start : start + _BLOCK].view(np.uint64)
            if keys.max() >= _INFINITY_KEY:
                keys = np.where(keys == _MINUS_ZERO_KEY, np.uint64(0), keys)
                refused = np.flatnonzero(keys >= _INFINITY_KEY)
                if refused.size:
                    position = start + int(refused[0])
                    raise ValueError(
                        f"Got score {chunk[position]} at position {position} of chunk {index}, both counted "
                        "from 0; allowed are finite scores from 0. Compute the scores of that chunk again."
                    )
            yield keys


def _offsets_inside(keys: NDArray[np.uint64], lowest: int, bits: int) -> NDArray[np.uint64]:
    """The distance from `lowest` of each key in [lowest, lowest + 2**bits)."""
    if bits == 63:
        return keys
    # The numbers are unsigned: keys below the range wrap around to far above it, so one comparison is enough.
    offsets = keys - np.uint64(lowest)
    return offsets[offsets < np.uint64(1 << bits)]


def _finer(bits: int) -> int:
    """The number of low bits that are still unknown once the next digit is known."""
    return max(0, bits - _DIGIT_BITS)


def _score(key: int) -> float:
    return float(np.uint64(key).view(np.float64))


def _check_unchanged(first: tuple[int, int], now: tuple[int, int]) -> None:
    """Raise unless a pass saw as many scores, in all and around the N-th, as the passes before it."""
    if now != first:
        raise RuntimeError(
            f"Got {now[0]} scores, {now[1]} of them near the threshold, where an earlier pass over the same "
            f"stream saw {first[0]} and {first[1]}; every pass has to see the same scores. Give a fresh "
            "iterator at each call, and select again when nothing writes the scores."
        )
