"""Moments: row count, mean and scatter matrix of a pool, built batch by batch and merged shard by shard.

Everything that the subspace needs to know about n rows fits in d(d+1)/2 + d + 1 numbers, and these can be
added: an update for a changed shard reads only that shard. All sums are float64, whatever the dtype of the
rows.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from scalselect_assets.method.interrupts import deferred
from scalselect_assets.method.subspace.device_sums import DeviceSums

# Rows are gathered up to this many bytes before they are multiplied: long products run near the processor's
# limit, short ones at the memory's.
_BUFFER_BYTES = 1 << 26
_BUFFER_ROWS = 2048

# Rows that begin a power of two of bytes apart fall into the same few places of a cache; this many numbers
# between them move them apart: a tenth of the time at d = 2048.
_PADDING = 8

# Width of the tiles that a Gram matrix is computed in: only tiles on and above the diagonal are, which are
# half of the multiplications, and each is one task for one core.
_TILE = 256

# Rows that are converted and shifted at a time, so that they stay in a core's cache, and in one task.
_CHUNK_ROWS = 64
_TASK_ROWS = 512

_ONE_CALLER = threading.Lock()


class NonFiniteError(ValueError):
    """A value is NaN or infinite; the message names its row."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """First and second moments of n rows of width d, about their own mean.

    The scatter is centred because hidden states have outlier dimensions whose mean is far above their
    spread: in Σxxᵀ the spread would be lost below the square of the mean. Half of it is kept: at d = 4096
    that is 67 MB.

    Attributes:
        n: Number of rows.
        mean: (d,) float64; zeros when ``n`` is 0.
        scatter_upper: (d(d+1)/2,) float64, upper triangle of Σ(x - mean)(x - mean)ᵀ, row by row.
    """

    n: int
    mean: NDArray[np.float64]
    scatter_upper: NDArray[np.float64]

    @classmethod
    def empty(cls, d: int) -> "Moments":
        """The moments of no rows, the identity of ``merge``.

        Raises:
            ValueError: ``d`` is below 1.
        """
        if d < 1:
            raise ValueError(f"Got dimension {d}; allowed is 1 or more. Pass the width of the embeddings.")
        return cls(0, np.zeros(d), np.zeros(d * (d + 1) // 2))

    @classmethod
    def of(cls, x: NDArray[Any]) -> "Moments":
        """The moments of one matrix, (m, d) of any real dtype; see ``MomentsAccumulator``."""
        return accumulate([x], matrix_width(x))

    @property
    def d(self) -> int:
        """Width of the rows."""
        return len(self.mean)

    def scatter(self) -> NDArray[np.float64]:
        """Σ(x - mean)(x - mean)ᵀ as a new (d, d) float64 array, exactly symmetric."""
        full = np.empty((self.d, self.d))
        for i, row in enumerate(packed_rows(self.scatter_upper, self.d)):
            full[i, i:] = row
        for i in range(0, self.d, _TILE):
            tile = slice(i, i + _TILE)
            full[tile, tile] = np.triu(full[tile, tile]) + np.triu(full[tile, tile], 1).T
            full[i + _TILE :, tile] = full[tile, i + _TILE :].T
        return full

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows together, in O(d²) time and memory.

        The parallel update of Chan, Golub & LeVeque (1979), "Updating formulae and a pairwise algorithm for
        computing sample variances". Associative and commutative up to rounding. `running` also takes rows
        out again.

        Raises:
            ValueError: The dimensions differ.
        """
        check_same_dimension(self, other)
        if other.n == 0:
            return self
        if self.n == 0:
            return other
        n = self.n + other.n
        delta = other.mean - self.mean
        scatter = self.scatter_upper + other.scatter_upper
        add_outer(scatter, delta, self.n * other.n / n)
        return Moments(n, self.mean + delta * (other.n / n), scatter)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays to store, named as the attributes, C-contiguous; ``n`` is () int64."""
        return {
            "n": np.array(self.n, dtype=np.int64),
            "mean": self.mean,
            "scatter_upper": self.scatter_upper,
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
        return cls(int(n), mean, stored_array(arrays, "scatter_upper", (d * (d + 1) // 2,), np.float64))


class MomentsAccumulator:
    """The moments of a stream of rows, in O(d²) memory and n·d² multiplications, half of a plain product.

    Rows are shifted by the mean of the first buffer (2048 rows, or 64 MiB of them), added up, and the rest of
    the mean is taken out at the end. Against centring on the true mean this loses at most a factor of the
    number of buffers in rounding, whatever the data: where the mean has moved by Δ since the first of b
    buffers, the rows have a variance of Δ²/b or more from that alone.

    The split into batches changes the result only by rounding; the number of cores does not change it.
    """

    def __init__(self, d: int, *, device: str = "cpu") -> None:
        """Begin with no rows.

        Args:
            d: Width of the rows.
            device: ``cpu``, or a torch device (``cuda``) that multiplies in float64.
        """
        self._empty = Moments.empty(d)
        self._n = 0
        self._on_device = None if device == "cpu" else DeviceSums(d, device)
        if self._on_device is not None:
            return
        rows = max(1, min(_BUFFER_ROWS, _BUFFER_BYTES // (8 * d)))
        self._buffer = np.empty((rows, d + _PADDING))[:, :d]
        self._filled = 0
        self._shift = np.zeros(d)
        self._sum = np.zeros(d)
        self._gram = _CpuGram(d)

    def add(self, x: NDArray[Any], *, names: Sequence[str] | None = None) -> None:
        """Add a batch.

        Args:
            x: (m, d) rows of any real dtype; summed in float64.
            names: Names of the m rows in error messages; by default their number in the stream.

        Raises:
            NonFiniteError: A row holds NaN or an infinity.
            ValueError: ``x`` is not a matrix of the stream's width.
        """
        d = self._empty.d
        matrix_width(x, expected=d)
        if self._on_device is not None:
            if not self._on_device.add(x):
                finite_rows(x, first_row=self._n, names=names)
            self._n += len(x)
            return
        start = 0
        while start < len(x):
            taken = x[start : start + len(self._buffer) - self._filled]
            if self._n == 0:
                # Shifting by a row first makes columns that never vary exactly zero, not zero up to rounding
                # of the mean; a pool of identical rows then has exactly no energy.
                self._shift = np.array(taken[0], dtype=np.float64)
            self._sum += self._fill(taken)
            if not np.isfinite(self._sum).all():
                finite_rows(taken, first_row=self._n, names=names and names[start:])
            start += len(taken)
            self._n += len(taken)
            if self._filled == len(self._buffer):
                self._flush()

    def moments(self) -> Moments:
        """The moments of all rows so far."""
        if self._n == 0:
            return self._empty
        if self._on_device is not None:
            shift, total, scatter = self._on_device.on_host()
        else:
            self._flush()
            shift, total, scatter = self._shift, self._sum, self._gram.upper()
        add_outer(scatter, total, -1 / self._n)
        return Moments(self._n, shift + total / self._n, scatter)

    def _fill(self, rows: NDArray[Any]) -> NDArray[np.float64]:
        """Append shifted rows to the buffer; returns their sum, (d,)."""
        target = self._buffer[self._filled : self._filled + len(rows)]
        shift = self._shift

        def convert(first: int) -> NDArray[np.float64]:
            total = np.zeros(len(shift))
            # The caller reports values that are not finite, with their row.
            with np.errstate(invalid="ignore", over="ignore"):
                for start in range(first, min(first + _TASK_ROWS, len(rows)), _CHUNK_ROWS):
                    chunk = target[start : start + _CHUNK_ROWS]
                    np.subtract(rows[start : start + _CHUNK_ROWS], shift, out=chunk, dtype=np.float64)
                    total += chunk.sum(axis=0)
            return total

        with one_blas_thread_per_core() as run:
            partial_sums = list(run(convert, range(0, len(rows), _TASK_ROWS)))
        self._filled += len(rows)
        total: NDArray[np.float64] = np.add.reduce(partial_sums)
        return total

    def _flush(self) -> None:
        rows = self._buffer[: self._filled]
        if self._n == self._filled and self._n > 0:
            # The first buffer: from here on, rows are shifted by its mean.
            offset = self._sum / self._n
            self._shift += offset
            rows -= offset
            self._sum = rows.sum(axis=0)
        if self._filled:
            self._gram.add(rows)
        self._filled = 0


class _CpuGram:
    """Σ rowsᵀ rows, (d, d), of which the upper triangle counts.

    Each core multiplies whole tiles with BLAS on one thread. That is faster than the symmetric product on the
    threads of NumPy's own BLAS: on 2 virtual AMD EPYC cores, 2048 rows of 1024 are multiplied at 67 GFLOP/s
    in these tiles, at 57 to 62 without them.
    """

    def __init__(self, d: int) -> None:
        self._sum = np.zeros((d, d))
        edges = [slice(i, min(i + _TILE, d)) for i in range(0, d, _TILE)]
        self._tiles = [(a, b) for position, a in enumerate(edges) for b in edges[position + 1 :]]
        self._tiles += [(a, a) for a in edges]  # the small tasks last, so that no core waits long

    def add(self, rows: NDArray[np.float64]) -> None:
        def multiply(tile: tuple[slice, slice]) -> None:
            self._sum[tile] += rows[:, tile[0]].T @ rows[:, tile[1]]

        with one_blas_thread_per_core() as run:
            list(run(multiply, self._tiles))

    def upper(self) -> NDArray[np.float64]:
        d = len(self._sum)
        packed = np.empty(d * (d + 1) // 2)
        for i, row in enumerate(packed_rows(packed, d)):
            row[:] = self._sum[i, i:]
        return packed


def accumulate(batches: Iterable[NDArray[Any]], d: int, *, device: str = "cpu") -> Moments:
    """The moments of a stream of batches; see ``MomentsAccumulator``, whose errors it raises."""
    accumulator = MomentsAccumulator(d, device=device)
    for batch in batches:
        accumulator.add(batch)
    return accumulator.moments()


def packed_rows(packed: NDArray[np.float64], d: int) -> Iterator[NDArray[np.float64]]:
    """Views of the rows of a packed upper triangle: row i has d - i values, from the diagonal on."""
    start = 0
    for i in range(d):
        yield packed[start : start + d - i]
        start += d - i


def add_outer(packed: NDArray[np.float64], vector: NDArray[np.float64], weight: float) -> None:
    """Add ``weight``·vector·vectorᵀ to a packed upper triangle, in place."""
    for i, row in enumerate(packed_rows(packed, len(vector))):
        np.add(row, (weight * vector[i]) * vector[i:], out=row)


def check_same_dimension(a: Moments, b: Moments) -> None:
    """Refuse moments that cannot be added.

    Raises:
        ValueError: The dimensions differ.
    """
    if a.d != b.d:
        raise ValueError(
            f"Got moments of dimensions {a.d} and {b.d}; only equal dimensions can be merged. "
            "Recompute the shards that another model or layer has embedded."
        )


@contextmanager
def one_blas_thread_per_core() -> Iterator[Callable[..., Iterator[Any]]]:
    """A ``map`` over as many threads as BLAS may use, while BLAS uses one in each call.

    Only one caller runs at a time: the limit applies to the whole process, and the cores are busy anyway. An
    interruption waits for the end of the block.
    """
    threads = _threads(n_cores())
    with deferred(), _ONE_CALLER, _blas().limit(limits=1, user_api="blas"):
        yield threads.map


@cache
def n_cores() -> int:
    """Threads for BLAS, as the environment (``OPENBLAS_NUM_THREADS``) and the process' affinity allow."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pools = _blas().select(user_api="blas").info()
    return min(affinity, max((int(pool["num_threads"]) for pool in pools), default=affinity))


@cache
def _threads(n: int) -> ThreadPoolExecutor:
    """A cached pool of threads: starting them takes longer than a small batch. They end with the process."""
    return ThreadPoolExecutor(n, thread_name_prefix="scalselect")


@cache
def _blas() -> ThreadpoolController:
    """The controller of BLAS threads, cached because finding the libraries takes milliseconds."""
    return ThreadpoolController()


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


def finite_rows(
    x: NDArray[Any], *, first_row: int = 0, names: Sequence[str] | None = None
) -> NDArray[np.float64]:
    """The matrix ``x`` in float64, with every value known to be finite.

    Args:
        x: (m, d) rows of any real dtype.
        first_row: Number of row 0 in the error message.
        names: Names of the rows in the error message, instead of numbers.

    Raises:
        NonFiniteError: A row holds NaN or an infinity; the message names the first such row.
    """
    rows = np.asarray(x, dtype=np.float64)
    finite = np.isfinite(rows)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        named = f"sample {names[row]}" if names is not None else f"row {first_row + row} (counted from 0)"
        raise NonFiniteError(
            f"Got {rows[row, column]} in {named}, column {column}; only finite values are allowed. Reject "
            "this sample, or embed it again in a wider dtype (float16 ends at 65504)."
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
