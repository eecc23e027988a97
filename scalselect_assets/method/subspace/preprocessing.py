"""The preprocessing of embeddings before their subspace is computed.

The paper's own runs centre the columns and nothing else, and so does the default. Two further steps of its
scoring script are offered, both off: rows of unit length (here, before the moments, since each row needs only
itself), and columns of unit variance (`subspace.principal_axes`, since the scatter matrix holds all that it
needs). With both, rows come first.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def prepared_rows(x: NDArray[Any], *, to_unit_length: bool) -> NDArray[Any]:
    """The rows in the form that the moments and the scores use.

    Args:
        x: (m, d) rows of any real dtype.
        to_unit_length: Whether to scale them by `unit_rows`.

    Returns:
        (m, d): float64 rows of unit length, or ``x`` itself, in its own dtype.
    """
    return unit_rows(x) if to_unit_length else x


def unit_rows(x: NDArray[Any]) -> NDArray[np.float64]:
    """The rows of (m, d) ``x`` scaled to Euclidean norm 1, in float64; a row of zeros stays one."""
    rows = np.asarray(x, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float64] = np.divide(rows, norms, out=np.zeros_like(rows), where=norms != 0)
    return unit
