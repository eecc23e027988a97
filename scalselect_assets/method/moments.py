"""Moments: row count, mean and scatter matrix of a pool, built batch by batch and merged shard by shard.

Everything that the subspace needs to know about n rows fits in d(d+1)/2 + d + 1 numbers, and these add: a
changed shard costs one shard. All sums are float64, whatever the rows are stored in.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


class NonFiniteError(ValueError):
    """A value is NaN or infinite; the message names its row."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """First and second moments of n rows of width d, about their own mean.

    The scatter is centred because hidden states have outlier dimensions whose mean is far above their
    spread: in Σxxᵀ the spread would be lost below the square of the mean.

    Attributes:
        n: Number of rows.
        mean: (d,) float64; zeros when ``n`` is 0.
        scatter: (d, d) float64, exactly symmetric: Σ(x - mean)(x - mean)ᵀ.
    """

    n: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]

    @classmethod
    def empty(cls, d: int) -> "Moments":
        """The moments of no rows, the identity of ``merge``.

        Raises:
            ValueError: ``d`` is below 1.
        """
        if d < 1:
            raise ValueError(f"Got dimension {d}; allowed is 1 or more. Pass the width of the embeddings.")
        return cls(0, np.zeros(d), np.zeros((d, d)))

    @classmethod
    def of(cls, x: NDArray[Any], *, first_row: int = 0) -> "Moments":
        """The moments of one batch, in O(m·d²) time and O(m·d + d²) memory.

        Args:
            x: (m, d) rows of any real dtype; summed in float64.
            first_row: What error messages call row 0 of this batch.

        Raises:
            NonFiniteError: A row holds NaN or an infinity.
            ValueError: ``x`` is not a matrix.
        """
        d = matrix_width(x)
        rows = finite_rows(x, first_row=first_row)
        if len(rows) == 0:
            return cls.empty(d)
        # Shifting by a row first makes columns that never vary exactly zero, not zero up to rounding of the
        # mean; a pool of identical rows then has exactly no energy.
        centred = rows - rows[0]
        shift = centred.mean(axis=0)
        centred -= shift
        return cls(len(rows), rows[0] + shift, centred.T @ centred)

    @property
    def d(self) -> int:
        """Width of the rows."""
        return len(self.mean)

    @property
    def total(self) -> NDArray[np.float64]:
        """Σx, (d,) float64."""
        return self.n * self.mean

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows together, in O(d²) time and memory.

        The parallel update of Chan, Golub & LeVeque (1979), "Updating formulae and a pairwise algorithm for
        computing sample variances". Associative and commutative up to rounding.

        Raises:
            ValueError: The dimensions differ.
        """
        if self.d != other.d:
            raise ValueError(
                f"Got moments of dimensions {self.d} and {other.d}; only equal dimensions can be merged. "
                "Recompute the shards that another model or layer has embedded."
            )
        if other.n == 0:
            return self
        if self.n == 0:
            return other
        n = self.n + other.n
        delta = other.mean - self.mean
        scatter = np.outer(delta, delta)
        scatter *= self.n * other.n / n
        scatter += self.scatter
        scatter += other.scatter
        return Moments(n, self.mean + delta * (other.n / n), scatter)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays to store, C-contiguous; the scatter as its upper triangle, row by row.

        ``n`` () int64, ``mean`` (d,) float64, ``scatter_upper`` (d(d+1)/2,) float64: half the bytes of the
        full matrix, and ``from_arrays`` restores it exactly.
        """
        return {
            "n": np.array(self.n, dtype=np.int64),
            "mean": self.mean,
            "scatter_upper": self.scatter[_upper_triangle(self.d)],
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "Moments":
        """Inverse of ``to_arrays``.

        Raises:
            ValueError: An array is missing, or has another shape or dtype than ``to_arrays`` gives it.
        """
        n = stored_array(arrays, "n", (), np.int64)
        mean = stored_array(arrays, "mean", (None,), np.float64)
        d = len(mean)
        packed = stored_array(arrays, "scatter_upper", (d * (d + 1) // 2,), np.float64)
        scatter = np.empty((d, d))
        upper = _upper_triangle(d)
        scatter[upper] = packed
        scatter.T[upper] = packed
        return cls(int(n), mean, scatter)


def accumulate(batches: Iterable[NDArray[Any]], d: int) -> Moments:
    """The moments of a stream of batches, in O(d² + largest batch) memory.

    Each batch costs O(m·d²) and its merge O(d²), so batches of many rows are cheaper than many batches. The
    split into batches changes the result only by rounding.

    Args:
        batches: (m, d) matrices of any real dtype, each read once.
        d: Width of every batch.

    Raises:
        NonFiniteError: A row holds NaN or an infinity; rows are counted over the whole stream.
        ValueError: A batch is not a matrix of width ``d``.
    """
    moments = Moments.empty(d)
    for batch in batches:
        matrix_width(batch, expected=d)
        moments = moments.merge(Moments.of(batch, first_row=moments.n))
    return moments


def matrix_width(x: NDArray[Any], *, expected: int | None = None) -> int:
    """The width of a matrix of rows.

    Raises:
        ValueError: ``x`` is not two-dimensional, has no columns, or is not ``expected`` wide.
    """
    wanted = "(rows, dimension)" if expected is None else f"(rows, {expected})"
    if x.ndim != 2 or x.shape[1] == 0 or expected not in {None, x.shape[1]}:
        raise ValueError(
            f"Got an array of shape {x.shape}; expected {wanted}. "
            "Pass one row per sample, all embedded by the same model and layer."
        )
    return int(x.shape[1])


def finite_rows(x: NDArray[Any], *, first_row: int = 0) -> NDArray[np.float64]:
    """The matrix ``x`` in float64, with every value known to be finite.

    Args:
        x: (m, d) rows of any real dtype.
        first_row: What the error message calls row 0.

    Raises:
        NonFiniteError: A row holds NaN or an infinity; the message names the first such row.
    """
    rows = np.asarray(x, dtype=np.float64)
    finite = np.isfinite(rows)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise NonFiniteError(
            f"Got {rows[row, column]} in row {first_row + row} (counted from 0), column {column}; only "
            "finite values are allowed. Reject this sample, or embed it again in a wider dtype (float16 ends "
            "at 65504)."
        )
    return rows


def stored_array(
    arrays: Mapping[str, NDArray[Any]], name: str, shape: tuple[int | None, ...], dtype: type[np.generic]
) -> NDArray[Any]:
    """One array of a stored result, known to have its shape (None: any length) and dtype.

    Raises:
        ValueError: The array is missing or different.
    """
    if name not in arrays:
        raise ValueError(
            f"Got arrays {sorted(arrays)}; expected one named {name!r}. Materialize the artifact again."
        )
    array = arrays[name]
    fits = array.ndim == len(shape) and all(
        want in {None, have} for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype != dtype:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(
            f"Got array {name!r} of shape {array.shape} and dtype {array.dtype}; expected shape ({wanted}) "
            f"and dtype {np.dtype(dtype)}. Materialize the artifact again."
        )
    return array


def _upper_triangle(d: int) -> NDArray[np.bool_]:
    """A (d, d) mask of the diagonal and above; a mask takes 1/16 of the memory of the index pairs."""
    return np.tri(d, dtype=np.bool_).T
