"""Running totals of a pool's moments, from which a shard can be taken out as exactly as it was put in.

Replacing or removing a shard reads only that shard, not the pool. Subtraction is where digits are usually
lost: a shard of wild values that passes through would leave its rounding behind for ever. So everything here,
down to the difference of two means, is an unevaluated sum of two float64 numbers, some 32 digits, about a
point that never moves: putting a shard in and taking it out adds and subtracts the same numbers, and a point
that turns out to lie a million spreads away costs 12 of the 32 digits, none of the 16 that come out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.subspace.moments import Moments, check_same_dimension, packed_rows, stored_array

Array = NDArray[np.float64]


class RunningMoments:
    """Moments of a changing set of shards.

    Attributes:
        n: Number of rows.
        reference: (d,) float64, the point that the totals are about.
        total: (2, d) float64, Σ(x - reference); the value is the sum over the first axis.
        gram_upper: (2, d(d+1)/2) float64, upper triangle of Σ(x - reference)(x - reference)ᵀ; the
            value is the sum over the first axis.
    """

    def __init__(self, reference: Array) -> None:
        """Begin with no rows, about the point ``reference``, (d,) float64; best is a point among the rows."""
        d = len(reference)
        self.n = 0
        self.reference = reference
        self.total = np.zeros((2, d))
        self.gram_upper = np.zeros((2, d * (d + 1) // 2))

    def add(self, shard: Moments) -> None:
        """Put a shard in, in O(d²).

        Raises:
            ValueError: Its dimension is another one.
        """
        self._accumulate(shard, 1)

    def remove(self, shard: Moments) -> None:
        """Take a shard out, in O(d²); it must be the very moments that were put in.

        Raises:
            ValueError: Its dimension is another one, or it has more rows than there are.
        """
        if shard.n > self.n:
            raise ValueError(
                f"Got a shard of {shard.n} rows to take out of {self.n}; only a shard that was put in can be "
                "taken out. Rebuild the totals from all shards."
            )
        self._accumulate(shard, -1)

    def moments(self) -> Moments:
        """The moments of all rows, as merging the shards gives them, in O(d²)."""
        d = len(self.reference)
        if self.n == 0:
            return Moments.empty(d)
        total = _Pair(self.total[0], self.total[1])
        offset = total.divided_by(self.n)
        scatter = np.empty(len(self.gram_upper[0]))
        rows = zip(
            packed_rows(scatter, d),
            packed_rows(self.gram_upper[0], d),
            packed_rows(self.gram_upper[1], d),
            strict=True,
        )
        for i, (row, high, low) in enumerate(rows):
            of_mean = total.at(i).times(offset.since(i))
            np.subtract(high, of_mean.high, out=row)
            np.add(row, low - of_mean.low, out=row)
        return Moments(self.n, self.reference + offset.high + offset.low, scatter)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays to store, named as the attributes; ``n`` is () int64."""
        return {
            "n": np.array(self.n, dtype=np.int64),
            "reference": self.reference,
            "total": self.total,
            "gram_upper": self.gram_upper,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "RunningMoments":
        """Inverse of ``to_arrays``.

        Raises:
            ValueError: An array is missing, or has another shape or dtype than ``to_arrays`` gives it.
        """
        running = cls(stored_array(arrays, "reference", (None,), np.float64))
        d = len(running.reference)
        running.n = int(stored_array(arrays, "n", (), np.int64))
        running.total = stored_array(arrays, "total", (2, d), np.float64)
        running.gram_upper = stored_array(arrays, "gram_upper", (2, d * (d + 1) // 2), np.float64)
        return running

    def _accumulate(self, shard: Moments, sign: int) -> None:
        d = len(self.reference)
        if shard.d != d:
            check_same_dimension(shard, Moments.empty(d))
        if shard.n == 0:
            return
        # The same shard gives the same bits here, whenever and with whichever sign it comes.
        offset = _Pair(*_sum(shard.mean, -self.reference))
        weighted = offset.times(_Pair(np.float64(shard.n), np.float64(0)))
        _add(self.total[0], self.total[1], sign * weighted.high, sign * weighted.low)
        rows = zip(
            packed_rows(self.gram_upper[0], d),
            packed_rows(self.gram_upper[1], d),
            packed_rows(shard.scatter_upper, d),
            strict=True,
        )
        for i, (high, low, scatter) in enumerate(rows):
            of_mean = weighted.at(i).times(offset.since(i))
            _add(high, low, sign * of_mean.high, sign * of_mean.low)
            _add(high, low, sign * scatter, 0.0)
        self.n += sign * shard.n


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """Numbers as unevaluated sums of two float64 numbers, the second below the rounding of the first."""

    high: Any
    low: Any

    def at(self, i: int) -> "_Pair":
        return _Pair(self.high[i], self.low[i])

    def since(self, i: int) -> "_Pair":
        return _Pair(self.high[i:], self.low[i:])

    def times(self, other: "_Pair") -> "_Pair":
        product, error = _product(self.high, other.high)
        return _Pair(product, error + (self.high * other.low + self.low * other.high))

    def divided_by(self, n: int) -> "_Pair":
        quotient = self.high / n
        product, error = _product(quotient, np.float64(n))
        return _Pair(quotient, (((self.high - product) - error) + self.low) / n)


def _add(high: Array, low: Array, term: Array, term_low: Array | float) -> None:
    """Add ``term + term_low`` to ``high + low``, in place."""
    rough, error = _sum(high, term)
    low += error
    low += term_low
    high[:] = rough + low
    low -= high - rough


def _sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum and its error, exactly.

    Knuth, The Art of Computer Programming, vol. 2, 4.2.2, theorem B.
    """
    rough = a + b
    virtual = rough - a
    return rough, (a - (rough - virtual)) + (b - virtual)


def _product(a: Any, b: Any) -> tuple[Any, Any]:
    """The rounded product and its error, exactly, where nothing overflows.

    Dekker (1971), "A floating-point technique for extending the available precision".
    """
    product = a * b
    a_high, a_low = _halves(a)
    b_high, b_low = _halves(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(a: Any) -> tuple[Any, Any]:
    """Veltkamp's split into two numbers of 26 bits, whose products are exact."""
    shifted = 134217729.0 * a  # 2²⁷ + 1
    high = shifted - (shifted - a)
    return high, a - high
