"""Leverage: how much of a pool's dominant subspace rests on one row.

ScalSelect's step 5 (arXiv 2602.11636): the squared length of a row of U_k, computed without U as
‖(x - μ) V_k S_k⁻¹‖², so that any shard can be scored from the subspace alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.subspace.basis import Subspace
from scalselect_assets.method.subspace.moments import finite_rows, matrix_width, one_blas_thread_per_core

# No row of a fitted pool exceeds 1; rounding does by far less than this.
_ROUNDING = 1e-4

_DEVICE_ROWS = 8192  # that cross to a device at a time
_BLOCK_ROWS = 512  # rows of one product, the task of one core


# Measured: with the strongest direction this many times the weakest kept one, float32 projections give scores
# within 4e-6 of float64, and the error grows in proportion. An energy threshold of 0.9 keeps every direction
# above √(10·d) of the strongest, 202 at d = 4096, so the paper's own setting stays below it.
_FLOAT32_UP_TO = 256.0

_EXACT_BITS = 18
"""Scores of equal rows agree to so many binary digits, and mostly to more."""

# With few directions, single rows lie so near to the plane across all of them that their score is float32's
# rounding; and few directions cost little in float64.
_FLOAT32_FROM_K = 8


class LeverageScorer:
    """Scores any number of batches against one subspace, in O(d·k) memory beside them.

    Rows are centred in float64 and projected in float32, which is twice as fast, where that keeps the scores
    within 1e-5 of float64; where the directions are too few for that, or their strengths lie too far apart,
    in float64.
    """

    def __init__(self, subspace: Subspace, *, device: str = "cpu") -> None:
        """Prepare the projection.

        Args:
            subspace: Fitted on a pool that holds the rows to be scored.
            device: ``cpu``, or a torch device (``cuda``).
        """
        self._subspace, self._device = subspace, device
        self._dtype = projection_dtype(subspace)
        self._whitening: NDArray[Any] = np.ascontiguousarray(subspace.whitening, dtype=self._dtype)
        # The mean as a sum of two float32 numbers: the first difference is rounded like one of float64.
        self._mean_high = subspace.mean.astype(np.float32)
        self._mean_low = (subspace.mean - self._mean_high).astype(np.float32)
        self._on_torch: tuple[Any, ...] | None = None

    @property
    def normalisation(self) -> float:
        """The factor n/k, which scales scores to a mean of 1 over the pool, to compare pools.

        It is 0.0 where k is 0 and thus all scores are 0.
        """
        return self._subspace.n / self._subspace.k if self._subspace.k else 0.0

    def scores(self, x: NDArray[Any], *, names: Sequence[str] | None = None) -> NDArray[np.float64]:
        """The leverage of rows that are part of the fitted pool, (m,) float64 in [0, 1].

        Over the whole pool the scores sum to k. The same batch gives the same bits again on one machine;
        equal rows of different places agree to 1e-6, since BLAS adds up in an order that depends on the
        place. Where the subspace is empty (k = 0) every score is 0.

        Costs O(m·d·k) time and O(m) memory.

        Args:
            x: (m, d) rows of any real dtype.
            names: Names of the rows in error messages; by default their number in the batch.

        Raises:
            NonFiniteError: A row holds NaN or an infinity.
            ValueError: ``x`` is not a matrix of the subspace's width, or a score exceeds 1, which no row of
                the fitted pool can.
        """
        matrix_width(x, expected=self._subspace.d)
        scores = self._on_cores(x) if self._device == "cpu" else self._on_device(x)
        if not np.isfinite(scores).all():
            finite_rows(x, names=names)
        outside = scores > 1 + _ROUNDING
        if outside.any():
            row = int(outside.argmax())
            named = f"sample {names[row]}" if names is not None else f"row {row} (counted from 0)"
            raise ValueError(
                f"Got leverage {scores[row]:.6g} in {named}; a row of the fitted pool has at most 1, so this "
                f"one is not among the {self._subspace.n} rows of the basis. Refit the basis on all current "
                "rows, this one included."
            )
        return np.minimum(scores, 1.0)

    def _on_cores(self, x: NDArray[Any]) -> NDArray[np.float64]:
        scores = np.empty(len(x))

        def score(start: int) -> None:
            rows = x[start : start + _BLOCK_ROWS]
            # The caller reports values that are not finite, with their row.
            with np.errstate(invalid="ignore", over="ignore"):
                projected = self._centred(rows) @ self._whitening
                scores[start : start + len(rows)] = np.square(projected, dtype=np.float64).sum(axis=1)

        with one_blas_thread_per_core() as run:
            list(run(score, range(0, len(x), _BLOCK_ROWS)))
        return scores

    def _centred(self, rows: NDArray[Any]) -> NDArray[Any]:
        if rows.dtype == self._dtype == np.float32:
            centred: NDArray[Any] = rows - self._mean_high
            centred -= self._mean_low
            return centred
        exact: NDArray[np.float64] = np.subtract(rows, self._subspace.mean, dtype=np.float64)
        return exact.astype(self._dtype, copy=False)

    def _on_device(self, x: NDArray[Any]) -> NDArray[np.float64]:
        import torch

        from scalselect_assets.method.transfers import Transfers

        if self._on_torch is None:
            transfers = Transfers(torch.device(self._device))
            arrays = (self._whitening, self._subspace.mean)
            self._on_torch = (transfers, *(transfers.to_device(torch.from_numpy(one)) for one in arrays))
        transfers, whitening, mean = self._on_torch
        # Rows that are narrower than float64 cross to the device as float32, in which they are exact.
        kind = np.float32 if x.dtype in (np.float16, np.float32) else np.float64
        found = []
        for start in range(0, len(x), _DEVICE_ROWS):
            rows = transfers.to_device(transfers.copied(x[start : start + _DEVICE_ROWS], kind))
            projected = ((rows.double() - mean).to(whitening.dtype) @ whitening).double()
            found.append(projected.square().sum(dim=1))
        return np.array(torch.cat(found).cpu().numpy()) if found else np.empty(0)


def ranked(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The scores for ranking, rounded to the digits that are exact, so that equal rows tie.

    The same row in another place, or embedded in another batch, has a score that is off by rounding, some
    1e-6 of it. Rounding to 18 binary digits moves a score by 4e-6 at most, an error that it may have anyway.
    Two scores on either side of a rounding border still differ by one step; see
    `candidates.levelled`.

    Args:
        scores: (m,) finite.
    """
    mantissa, exponent = np.frexp(scores)
    rounded: NDArray[np.float64] = np.ldexp(np.rint(np.ldexp(mantissa, _EXACT_BITS)), exponent - _EXACT_BITS)
    return rounded


def projection_dtype(subspace: Subspace) -> type[np.float32] | type[np.float64]:
    """The dtype that rows are projected in, such that scores are within 1e-5 (relative) of float64."""
    strengths = subspace.singular_values
    if subspace.k < _FLOAT32_FROM_K or strengths[0] > _FLOAT32_UP_TO * strengths[-1]:
        return np.float64
    return np.float32


def leverage_scores(x: NDArray[Any], subspace: Subspace) -> NDArray[np.float64]:
    """The leverage of the rows of one matrix; see ``LeverageScorer.scores``."""
    return LeverageScorer(subspace).scores(x)
