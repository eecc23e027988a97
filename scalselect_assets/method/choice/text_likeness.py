"""The likeness of the texts of two samples, which their vectors hardly show.

The vector of a sample is a mean of vision tokens, and the question only decides which of them are averaged.
Two questions about one picture are therefore close by their vectors although they teach different things.
This module compares the texts: the words and pairs of neighbouring words that two samples share, each
weighted by how rare it is in the pool (its inverse document frequency), so that "what", "is" and "the"
decide little and "circle" decides much. What is asked and what is answered are compared apart, and the
lower likeness counts.

The likeness of two texts is the weight that they share, as a share of the shorter text. A text that weighs
less than `SHORTEST` of the other counts as weighing that much, so a question inside a long conversation is
not its copy.

Costs: 4 bytes for each distinct word and pair of a text, at most 2 KiB a sample, and 8 MiB of frequencies.
"""

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

SHORTEST: Final = 0.25
"""A text counts as at least this share of the one that it is compared with."""

LIKENESS_DECIMALS: Final = 6
"""Likenesses are compared rounded to so many decimals: more is the rounding of sums."""

_MOST_SHINGLES = (
    256  # of one side of a sample; those of the smallest hashes, so that equal texts keep the same
)
_BUCKETS = np.uint32(1 << 20)  # two hashes in one bucket share a frequency
_PAIRS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Shingles:
    """The words and pairs of neighbouring words of n texts, as hashes.

    Attributes:
        start: (n + 1,) int64; the hashes of text i are ``hashes[start[i]:start[i + 1]]``.
        hashes: uint32, ascending and distinct within a text.
        weight: (2²⁰,) float64, the inverse document frequency by the hash modulo 2²⁰.
        total: (n,) float64, the weight of each text.
    """

    start: NDArray[np.int64]
    hashes: NDArray[np.uint32]
    weight: NDArray[np.float64]
    total: NDArray[np.float64]

    @classmethod
    def of(cls, texts: Sequence[NDArray[np.uint32]]) -> "Shingles":
        """Collect the `shingles` of texts; hashes in the same one of 2²⁰ buckets share a frequency."""
        n = len(texts)
        start = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
        hashes = np.concatenate([np.empty(0, np.uint32), *texts])
        frequency = np.bincount(hashes % _BUCKETS, minlength=int(_BUCKETS))
        weight = np.log((n + 1) / np.clip(frequency, 1, max(1, n)))
        owner = np.repeat(np.arange(n), np.diff(start))
        total = np.bincount(owner, weight[hashes % _BUCKETS], n).astype(np.float64)
        return cls(start, hashes, weight, total)

    def likeness(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
        """The likeness of each pair of texts, (m,) in [0, 1]; 1 where both are empty."""
        shared = np.zeros(len(first))
        for begin in range(0, len(first), _PAIRS_AT_ONCE):
            part = slice(begin, begin + _PAIRS_AT_ONCE)
            shared[part] = self._shared(first[part], second[part])
        shorter = np.minimum(self.total[first], self.total[second])
        longer = np.maximum(self.total[first], self.total[second])
        likeness = np.ones(len(first))
        np.divide(shared, np.maximum(shorter, SHORTEST * longer), out=likeness, where=longer > 0)
        return np.asarray(np.round(np.minimum(likeness, 1.0), LIKENESS_DECIMALS), np.float64)

    def _shared(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
        """The weight that the texts of each pair share."""
        pair, place = self._places(first)
        other_pair, other_place = self._places(second)
        key = pair.astype(np.uint64) << np.uint64(32) | self.hashes[place]
        other = other_pair.astype(np.uint64) << np.uint64(32) | self.hashes[other_place]
        both = np.isin(key, other, assume_unique=True)
        weights = self.weight[self.hashes[place[both]] % _BUCKETS]
        return np.bincount(pair[both], weights, len(first)).astype(np.float64)

    def _places(self, texts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For every hash of some texts, the number of its text among them and its place in ``hashes``."""
        n_hashes = self.start[texts + 1] - self.start[texts]
        number = np.repeat(np.arange(len(texts)), n_hashes)
        within = np.arange(len(number)) - np.repeat(np.cumsum(n_hashes) - n_hashes, n_hashes)
        return number, self.start[texts][number] + within


@dataclass(frozen=True, slots=True, eq=False)
class TextLikeness:
    """The questions and answers of n samples, compared pair by pair.

    Attributes:
        asked: Shingles of the turns of users and systems.
        answered: Shingles of the turns of assistants.
    """

    asked: Shingles
    answered: Shingles

    def __call__(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
        """The lower likeness of what is asked and what is answered, (m,) in [0, 1].

        Args:
            first: (m,) positions of samples.
            second: (m,) positions of the samples that they are compared with.
        """
        return np.minimum(self.asked.likeness(first, second), self.answered.likeness(first, second))


def shingles(words: Sequence[str]) -> NDArray[np.uint32]:
    """The distinct hashes of a text's words and of its pairs of neighbouring words, ascending."""
    pairs = (f"{one} {other}" for one, other in itertools.pairwise(words))
    hashes = np.array([zlib.crc32(part.encode()) for part in (*words, *pairs)], np.uint32)
    return np.unique(hashes)[:_MOST_SHINGLES]
