"""Which rows of a ranking repeat a better one: the best of each neighbourhood stays, the others go.

Not part of the paper, which scores each sample by itself: two samples that are the same have the same
leverage and are chosen together. The rule: in the order of the ranking, a row is removed if a row that was
kept before it points in nearly the same direction; of several such rows, the first is its partner. A removed
row removes nothing. So every removed row is within the threshold of its partner, no two kept rows are within
it of each other, and the result depends on the ranking and the vectors only, not on blocks or the order of
reading.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.subspace.preprocessing import prepared_rows, unit_rows

Candidates: TypeAlias = Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]]
"""Batches of (m,) positions and their (m, d) unit vectors."""

COSINE_DECIMALS = 6
"""Cosines are compared rounded to so many: more than that is the rounding of float32 vectors."""

_MARGIN = 1e-4  # a float32 product is off by less, so what it leaves out cannot reach the threshold
_BLOCK_ROWS = 1024
# Vectors that differ from the mean by less, relative to their length, are the mean: the direction of the rest
# is the rounding of float32.
_NO_DIRECTION = 1e-6


class Vectors(Protocol):
    """Unit vectors by position, wherever they are kept; a vector of zeros is near nothing."""

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors at (m,) positions, (m, d), in their order."""

    def near(self, queries: NDArray[np.float32], cosine: float) -> Candidates:
        """Rows among which are those with at least this cosine to one of the (q, d) queries."""


@dataclass(frozen=True, slots=True, eq=False)
class Removals:
    """What became of n rows.

    Attributes:
        partner: (n,) int64, the position of the kept row that each row was removed for; -1 if it is kept.
        cosine: (n,) float64, between the two; NaN if it is kept.
    """

    partner: NDArray[np.int64]
    cosine: NDArray[np.float64]

    @property
    def kept(self) -> NDArray[np.bool_]:
        """(n,) bool."""
        kept: NDArray[np.bool_] = self.partner < 0
        return kept


def centred_directions(
    x: NDArray[Any], mean: NDArray[np.float64], scale: NDArray[np.float64], *, to_unit_length: bool
) -> NDArray[np.float32]:
    """Rows as they are compared: unit vectors from the pool's mean, (m, d) float32.

    First-layer states share a large mean: without centring, the median cosine of two samples of the demo pool
    is 0.97. After projecting on the k kept directions only, different samples come nearer to each other than
    copies are: among the pairs above 0.95, one in four shows the same image there, and 17 of 20 in all
    directions.

    Args:
        x: (m, d) rows of any real dtype.
        mean: (d,) of the subspace.
        scale: (d,) of the subspace; ones unless standardised.
        to_unit_length: Whether the subspace was fitted on rows of unit length.

    Returns:
        Rows of length 1; zeros where a row is the mean, up to rounding.
    """
    prepared = prepared_rows(x, to_unit_length=to_unit_length)
    centred: NDArray[np.float64] = np.subtract(prepared, mean, dtype=np.float64) / scale
    lengths = np.linalg.norm(np.asarray(prepared, np.float64) / scale, axis=1, keepdims=True)
    centred[(np.linalg.norm(centred, axis=1, keepdims=True) <= _NO_DIRECTION * lengths)[:, 0]] = 0.0
    return unit_rows(centred).astype(np.float32)


def near_duplicates(
    order: NDArray[np.int64], vectors: Vectors, cosine: float, *, block_rows: int = _BLOCK_ROWS
) -> Removals:
    """The removals that the rule above makes.

    Costs: each kept row is compared once with the candidates that ``vectors`` gives for it; memory of
    some scalars per row, and of one block and one batch of candidates with the products of the two.

    Args:
        order: (n,) the positions 0 to n - 1, the best first.
        vectors: Theirs.
        cosine: From which on a row repeats another one, in (0, 1].
        block_rows: Rows that are compared with all others together; the result does not depend on it.

    Raises:
        ValueError: The threshold is out of range, or ``order`` is no order.
    """
    if not 0 < cosine <= 1:
        raise ValueError(f"Got a cosine of {cosine}; a threshold lies in (0, 1], near 1 for near-duplicates.")
    n = len(order)
    if not np.array_equal(np.sort(order), np.arange(n)):
        raise ValueError(f"Got an order of {n} rows that does not hold each position from 0 to {n - 1} once.")
    removals = Removals(np.full(n, -1, np.int64), np.full(n, np.nan))
    waiting = np.ones(n, np.bool_)
    rest = order
    while len(rest):
        block, rest = rest[:block_rows], rest[block_rows:]
        waiting[block] = False
        x = vectors.take(block)
        leaders = _leaders(block, x, cosine, removals)
        if not len(rest):
            break
        positions, queries = block[leaders], x[leaders]
        for candidates, y in vectors.near(queries, cosine - _MARGIN):
            still = waiting[candidates]
            found, partner, value = _first_within(y[still], queries, cosine)
            removed = candidates[still][found]
            removals.partner[removed], removals.cosine[removed] = positions[partner], value
            waiting[removed] = False
        rest = rest[waiting[rest]]
    return removals


def pairs_within(queries: NDArray[np.float32], candidates: Candidates, cosine: float) -> NDArray[np.int64]:
    """Number of the query and position of every candidate with at least this cosine to it, (p, 2), sorted."""
    pairs = [np.empty((0, 2), np.int64)]
    for positions, y in candidates:
        rows, numbers = np.nonzero(y @ queries.T >= cosine - _MARGIN)
        for start in range(0, len(rows), _BLOCK_ROWS):
            row, number = rows[start : start + _BLOCK_ROWS], numbers[start : start + _BLOCK_ROWS]
            within = _cosines(y[row], queries[number]) >= cosine
            pairs.append(np.stack([number[within], positions[row[within]]], axis=1))
    unique: NDArray[np.int64] = np.unique(np.concatenate(pairs), axis=0)
    return unique


def _leaders(
    block: NDArray[np.int64], x: NDArray[np.float32], cosine: float, removals: Removals
) -> NDArray[np.int64]:
    """Places in the block of the rows that are kept; the others' removals are noted."""
    maybe = x @ x.T >= cosine - _MARGIN
    kept = np.zeros(len(block), np.bool_)
    for place in range(len(block)):
        partners = np.flatnonzero(maybe[place, :place] & kept[:place])
        values = _cosines(x[partners], x[place])
        within = np.flatnonzero(values >= cosine)
        if len(within):
            removals.partner[block[place]] = block[partners[within[0]]]
            removals.cosine[block[place]] = values[within[0]]
        else:
            kept[place] = True
    return np.flatnonzero(kept)


def _first_within(
    y: NDArray[np.float32], queries: NDArray[np.float32], cosine: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Rows within the threshold of a query, the first such query of each, and their cosine."""
    maybe = y @ queries.T >= cosine - _MARGIN
    undecided = np.flatnonzero(maybe.any(axis=1))
    rows, partners, values = [], [], []
    while len(undecided):
        first = maybe[undecided].argmax(axis=1)
        value = _cosines(y[undecided], queries[first])
        within = value >= cosine
        rows.append(undecided[within])
        partners.append(first[within])
        values.append(value[within])
        maybe[undecided, first] = False
        undecided = undecided[~within & maybe[undecided].any(axis=1)]
    if not rows:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    return np.concatenate(rows), np.concatenate(partners), np.concatenate(values)


def _cosines(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of rows of unit length, pair by pair, in float64: other than a product of matrices, each by itself."""
    values: NDArray[np.float64] = np.round(np.multiply(x, y, dtype=np.float64).sum(axis=-1), COSINE_DECIMALS)
    return values
