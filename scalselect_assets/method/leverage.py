"""Leverage: how much of a pool's dominant subspace rests on one row.

ScalSelect's step 5 (arXiv 2602.11636): the squared length of a row of U_k, computed without U as
‖(x - μ) V_k S_k⁻¹‖², so that any shard can be scored from the subspace alone.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.moments import finite_rows, matrix_width
from scalselect_assets.method.subspace import Subspace

# No row of a fitted pool exceeds 1; rounding does by far less than this.
_ROUNDING = 1e-6

# Every product has this many rows. BLAS picks its kernel by the shape, so the same row would otherwise differ
# in its last bits from shard to shard, and ties between duplicates would no longer be ties.
_BLOCK_ROWS = 256


def leverage_scores(x: NDArray[Any], subspace: Subspace) -> NDArray[np.float64]:
    """The leverage of rows that are part of the fitted pool, (m,) float64 in [0, 1].

    Over the whole pool the scores sum to k. Equal rows get equal scores, bit for bit on one machine, whatever
    rows stand beside them. Where the subspace is empty (k = 0) every score is 0.

    Costs O(m·d·k) time and O(d·k + m) memory beside ``x``.

    Args:
        x: (m, d) rows of any real dtype; computed in float64.
        subspace: Fitted on a pool that holds these rows.

    Raises:
        NonFiniteError: A row holds NaN or an infinity.
        ValueError: ``x`` is not a matrix of the subspace's width, or a score exceeds 1, which no row of the
            fitted pool can.
    """
    matrix_width(x, expected=subspace.d)
    whitening = subspace.directions / subspace.singular_values
    scores = np.empty(len(x))
    block = np.zeros((_BLOCK_ROWS, subspace.d))
    for start in range(0, len(x), _BLOCK_ROWS):
        rows = finite_rows(x[start : start + _BLOCK_ROWS], first_row=start)
        np.subtract(rows, subspace.mean, out=block[: len(rows)])
        scores[start : start + len(rows)] = np.square(block @ whitening).sum(axis=1)[: len(rows)]

    outside = scores > 1 + _ROUNDING
    if outside.any():
        row = int(outside.argmax())
        raise ValueError(
            f"Got leverage {scores[row]:.6g} in row {row} (counted from 0); a row of the fitted pool has at "
            f"most 1, so this one is not among the {subspace.n} rows of the basis. Refit the basis on all "
            "current rows, this one included."
        )
    return np.minimum(scores, 1.0)
