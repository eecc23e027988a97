"""The directions that a row's leverage comes from, and the rows that are similar to it.

A row x of a pool has the coordinates u = (x - μ) V_k S_k⁻¹ in the basis, its row of U_k; its leverage is
‖u‖². So direction j adds u_j² to it, and the sign of u_j gives the side of the mean that the row lies on.
All computations are in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.subspace.basis import Subspace
from scalselect_assets.method.subspace.moments import matrix_width

_BLOCK_ROWS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class StrongestDirections:
    """The directions that add most to the leverage of each of m rows, strongest first.

    Attributes:
        direction: (m, n) int64: number of the direction, from 1; ties by number.
        share: (m, n) float64: the direction's part of the leverage, in [0, 1]; 0 where the leverage is 0.
        coordinate: (m, n) float64: u_ij, whose square is that part.
    """

    direction: NDArray[np.int64]
    share: NDArray[np.float64]
    coordinate: NDArray[np.float64]


def coordinates(
    subspace: Subspace, x: NDArray[Any], directions: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """The rows' coordinates in the basis: their rows of U_k.

    Costs O(m·d·j) time, and O(d·j) memory beside the result.

    Args:
        subspace: The basis that the rows are scored with.
        x: (m, d) rows as they are scored, of any real dtype.
        directions: (j,) which of the k directions, from 0; all by default.

    Returns:
        (m, j) float64.

    Raises:
        ValueError: ``x`` is not a matrix of the subspace's width.
    """
    matrix_width(x, expected=subspace.d)
    wanted = np.arange(subspace.k) if directions is None else directions
    whitening = subspace.directions[:, wanted] / subspace.scale[:, None] / subspace.singular_values[wanted]
    found = np.empty((len(x), len(wanted)))
    for block in _blocks(len(x)):
        found[block] = (np.asarray(x[block], dtype=np.float64) - subspace.mean) @ whitening
    return found


def strongest_directions(subspace: Subspace, vectors: NDArray[Any], n: int = 3) -> StrongestDirections:
    """The ``n`` directions that most of each row's leverage comes from; all k where there are fewer.

    Costs O(m·d·k) time, as scoring the same rows does.

    Args:
        subspace: The basis that the rows are scored with.
        vectors: (m, d) rows as they are scored (`preprocessing.prepared_rows`).
        n: Number of directions for each row, at least 1.

    Raises:
        ValueError: ``vectors`` is not a matrix of the subspace's width, or ``n`` is less than 1.
    """
    if n < 1:
        raise ValueError(f"Got {n} directions; allowed is 1 or more. Ask for at least one.")
    u = coordinates(subspace, vectors)
    squares = np.square(u)
    order = np.argsort(-squares, axis=1, kind="stable")[:, :n]
    leverage = squares.sum(axis=1, keepdims=True)
    held = np.take_along_axis(squares, order, axis=1)
    share = np.divide(held, leverage, out=np.zeros_like(held), where=leverage > 0)
    return StrongestDirections(order + 1, share, np.take_along_axis(u, order, axis=1))


def variance_between(total: NDArray[np.float64], n_marked: int, n: int) -> NDArray[np.float64]:
    """The share of each direction's variance between some marked rows and all others of the pool.

    It is 1 for a direction that only separates the marked rows from the others, and 0 for one that does not
    separate them at all.
    Over the pool, coordinates sum to 0 and their squares to 1, so the variance between the two groups follows
    from one sum: with S over m of n rows, it is S²/m + S²/(n - m) = S²·n / (m·(n - m)).

    Args:
        total: (j,) the sum of the marked rows' coordinates, or of the others'.
        n_marked: Number of marked rows, 1 to n - 1.
        n: Rows of the pool.
    """
    between: NDArray[np.float64] = np.square(total) * (n / (n_marked * (n - n_marked)))
    return np.minimum(between, 1.0)


def centred_cosines(subspace: Subspace, x: NDArray[Any], row: NDArray[Any]) -> NDArray[np.float64]:
    """The cosines of rows with one row, after centring on the basis' mean and division by its scale.

    Costs O(m·d) time and O(m) memory.

    Args:
        subspace: The basis.
        x: (m, d) rows as they are scored.
        row: (d,) the one row, in the form that is scored.

    Returns:
        (m,) float64 in [-1, 1]; 0 where either lies at the mean, where there is no angle.

    Raises:
        ValueError: ``x`` is not a matrix of the subspace's width.
    """
    matrix_width(x, expected=subspace.d)
    target = (np.asarray(row, dtype=np.float64) - subspace.mean) / subspace.scale
    length = np.linalg.norm(target)
    found = np.zeros(len(x))
    for block in _blocks(len(x)):
        rows = (np.asarray(x[block], dtype=np.float64) - subspace.mean) / subspace.scale
        lengths = np.linalg.norm(rows, axis=1) * length
        np.divide(rows @ target, lengths, out=found[block], where=lengths > 0)
    return np.clip(found, -1.0, 1.0)


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK_ROWS) for start in range(0, n, _BLOCK_ROWS))
