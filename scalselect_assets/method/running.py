"""Running totals of a pool's moments, from which a shard can be taken out as exactly as it was put in.

A shard that is replaced or removed costs that shard, not the pool. Subtraction is where digits are usually
lost: a shard of wild values that passes through would leave its rounding behind for ever. Each total is
therefore kept as an unevaluated sum of two float64 numbers (some 32 digits), about a point that never moves,
so that putting a shard in and taking it out adds and subtracts the same numbers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.moments import Moments, check_same_dimension, packed_rows, stored_array


class RunningMoments:
    """Moments of a changing set of shards.

    Attributes:
        n: Number of rows.
        reference: (d,) float64, the point that the totals are about: the mean of the first shard.
        total: (2, d) float64, Σ(x - reference); the value is the sum over the first axis.
        gram_upper: (2, d(d+1)/2) float64, upper triangle of Σ(x - reference)(x - reference)ᵀ, likewise.
    """

    def __init__(self, reference: NDArray[np.float64]) -> None:
        """No rows, about ``reference``, (d,) float64."""
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
        offset = self.total.sum(axis=0) / self.n
        scatter = self.gram_upper[0].copy()
        low = packed_rows(self.gram_upper[1], d)
        for i, (row, row_low) in enumerate(zip(packed_rows(scatter, d), low, strict=True)):
            np.subtract(row, (self.n * offset[i]) * offset[i:], out=row)
            np.add(row, row_low, out=row)
        return Moments(self.n, self.reference + offset, scatter)

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
        offset = shard.mean - self.reference
        weighted = shard.n * offset
        _add(self.total[0], self.total[1], sign * weighted)
        rows = zip(
            packed_rows(self.gram_upper[0], d),
            packed_rows(self.gram_upper[1], d),
            packed_rows(shard.scatter_upper, d),
            strict=True,
        )
        for i, (high, low, scatter) in enumerate(rows):
            about_reference = weighted[i] * offset[i:]
            about_reference += scatter
            _add(high, low, sign * about_reference)
        self.n += sign * shard.n


def _add(high: NDArray[np.float64], low: NDArray[np.float64], term: NDArray[np.float64]) -> None:
    """Add ``term`` to the sum ``high + low``, in place.

    The error-free sum of two numbers is Knuth's (The Art of Computer Programming, vol. 2, 4.2.2, theorem B).
    """
    rough = high + term
    virtual = rough - high
    low += (high - (rough - virtual)) + (term - virtual)
    high[:] = rough + low
    low -= high - rough
