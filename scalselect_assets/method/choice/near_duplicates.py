"""The removal of rows that repeat a better one: the best of each neighbourhood stays, the others go.

This is not part of the paper, which scores each sample by itself: two samples that are the same have the same
leverage and are chosen together. The rule: in the order of the ranking, a row is removed if a row that was
kept before it points in nearly the same direction; of several such rows, the first is its partner. A removed
row removes nothing. So every removed row is within the threshold of its partner, no two kept rows are within
it of each other, and the result depends on the ranking and the vectors only, not on blocks or the order of
reading.

The vector of a sample hardly shows what is asked about its picture. Where `Contents` are given, a row
therefore repeats another one only if their texts are alike as well; and rows with the same pictures and like
texts repeat each other whatever their vectors.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.choice.text_likeness import TextLikeness
from scalselect_assets.method.subspace.preprocessing import prepared_rows, unit_rows

Candidates: TypeAlias = Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]]
"""Batches of (m,) positions and their (m, d) unit vectors."""

COSINE_DECIMALS = 6
"""Cosines are compared rounded to so many: more than that is the rounding of float32 vectors."""

_MARGIN = 1e-4  # a float32 product is off by less, so what it leaves out cannot reach the threshold
_BLOCK_ROWS = 1024
# Vectors that differ from the mean by less, relative to their length, count as the mean: the direction of the
# difference is only float32 rounding.
_NO_DIRECTION = 1e-6


class Vectors(Protocol):
    """Unit vectors by position, wherever they are kept; a vector of zeros is near nothing."""

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors at (m,) positions, (m, d), in their order."""

    def near(self, queries: NDArray[np.float32], cosine: float) -> Candidates:
        """Rows among which are those with at least this cosine to one of the (q, d) queries."""


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """Pictures and texts of n rows, by position.

    Attributes:
        pictures: (n,) int64, equal for rows that show the same pictures in the same order.
        likeness: Compares their texts.
        least_likeness: Smallest likeness, in (0, 1], at which two texts count as the same.
    """

    pictures: NDArray[np.int64]
    likeness: TextLikeness
    least_likeness: float

    def __post_init__(self) -> None:
        if not 0 < self.least_likeness <= 1:
            raise ValueError(
                f"Got a least likeness of {self.least_likeness}; allowed is above 0 and at most 1. Give no "
                "contents where the vectors alone decide."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Removals:
    """The rows that were removed and kept, out of n rows.

    Attributes:
        partner: (n,) int64, the position of the kept row that each row was removed for; -1 if it is kept.
        cosine: (n,) float64, the cosine of each row and its partner; NaN if the row is kept.
        spared: (n,) bool, kept rows whose vector is within the threshold of a kept one with another text.
    """

    partner: NDArray[np.int64]
    cosine: NDArray[np.float64]
    spared: NDArray[np.bool_]

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Whether each row is kept, (n,) bool."""
        kept: NDArray[np.bool_] = self.partner < 0
        return kept


def centred_directions(
    x: NDArray[Any], mean: NDArray[np.float64], scale: NDArray[np.float64], *, to_unit_length: bool
) -> NDArray[np.float32]:
    """The rows in the form that is compared: unit vectors from the pool's mean, (m, d) float32.

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
    order: NDArray[np.int64],
    vectors: Vectors,
    cosine: float,
    *,
    contents: Contents | None = None,
    block_rows: int = _BLOCK_ROWS,
) -> Removals:
    """The removals that the rule above makes.

    Costs: each kept row is compared once with the candidates that ``vectors`` gives for it. Memory: some
    scalars per row, one block, one batch of candidates, and the products of the two.

    Args:
        order: (n,) the positions 0 to n - 1, the best first.
        vectors: Vectors of the rows.
        cosine: Smallest cosine, in (0, 1], at which a row repeats another one.
        contents: Pictures and texts of the rows; None compares vectors only.
        block_rows: Rows that are compared with all others together; the result does not depend on it.

    Raises:
        ValueError: The threshold is out of range, or ``order`` is no order.
    """
    if not 0 < cosine <= 1:
        raise ValueError(f"Got a cosine of {cosine}; a threshold lies in (0, 1], near 1 for near-duplicates.")
    n = len(order)
    if not np.array_equal(np.sort(order), np.arange(n)):
        raise ValueError(f"Got an order of {n} rows that does not hold each position from 0 to {n - 1} once.")
    removals = Removals(np.full(n, -1, np.int64), np.full(n, np.nan), np.zeros(n, np.bool_))
    comparison = _Comparison(cosine, contents, removals)
    waiting = np.ones(n, np.bool_)
    rest = order
    while len(rest):
        block, rest = rest[:block_rows], rest[block_rows:]
        waiting[block] = False
        x = vectors.take(block)
        leaders = comparison.leaders(block, x)
        if not len(rest):
            break
        positions, queries = block[leaders], x[leaders]
        near = vectors.near(queries, cosine - _MARGIN)
        for candidates, y in _also(
            near, comparison.sharing_pictures(positions, waiting, block_rows), vectors
        ):
            still = waiting[candidates]
            waiting[comparison.remove(candidates[still], y[still], positions, queries)] = False
        rest = rest[waiting[rest]]
    removals.spared[~removals.kept] = False
    return removals


def _also(near: Candidates, more: Iterable[NDArray[np.int64]], vectors: Vectors) -> Candidates:
    """The candidates by their vectors, then further ones by their positions."""
    yield from near
    for positions in more:
        yield positions, vectors.take(positions)


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


class _Comparison:
    """Compares rows with kept ones by the rule, and notes what it removes and what it spares."""

    def __init__(self, cosine: float, contents: Contents | None, removals: Removals) -> None:
        self._cosine, self._contents, self._removals = cosine, contents, removals
        if contents is not None:
            self._by_pictures = np.argsort(contents.pictures, kind="stable")
            self._pictures = contents.pictures[self._by_pictures]

    def leaders(self, block: NDArray[np.int64], x: NDArray[np.float32]) -> NDArray[np.int64]:
        """Places in the block of the rows that are kept; the others' removals are noted."""
        maybe = self._maybe(block, x, block, x)
        kept = np.zeros(len(block), np.bool_)
        for place in range(len(block)):
            partners = np.flatnonzero(maybe[place, :place] & kept[:place])
            row = np.full(len(partners), place)
            values, repeats = self._repeats(block[row], x[row], block[partners], x[partners])
            if repeats.any():
                first = int(repeats.argmax())
                self._note(block[place : place + 1], block[partners[[first]]], values[[first]])
            else:
                kept[place] = True
        return np.flatnonzero(kept)

    def remove(
        self,
        rows: NDArray[np.int64],
        y: NDArray[np.float32],
        kept: NDArray[np.int64],
        x: NDArray[np.float32],
    ) -> NDArray[np.int64]:
        """Note the rows that repeat a kept one, each with the first such row; returns their positions."""
        maybe = self._maybe(rows, y, kept, x)
        undecided = np.flatnonzero(maybe.any(axis=1))
        removed = [np.empty(0, np.int64)]
        while len(undecided):
            first = maybe[undecided].argmax(axis=1)
            values, repeats = self._repeats(rows[undecided], y[undecided], kept[first], x[first])
            gone = rows[undecided[repeats]]
            self._note(gone, kept[first[repeats]], values[repeats])
            removed.append(gone)
            maybe[undecided, first] = False
            undecided = undecided[~repeats & maybe[undecided].any(axis=1)]
        return np.concatenate(removed)

    def sharing_pictures(
        self, kept: NDArray[np.int64], waiting: NDArray[np.bool_], at_once: int
    ) -> Iterator[NDArray[np.int64]]:
        """Waiting rows with the pictures of a kept row, which their vectors may not show; in batches."""
        if self._contents is None:
            return
        pictures = np.unique(self._contents.pictures[kept])
        begin, end = (np.searchsorted(self._pictures, pictures, side) for side in ("left", "right"))
        several = end - begin > 1
        members = [self._by_pictures[a:b] for a, b in zip(begin[several], end[several], strict=True)]
        rows = np.concatenate([np.empty(0, np.int64), *members])
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            if (part := part[waiting[part]]).size:
                yield part

    def _maybe(
        self,
        rows: NDArray[np.int64],
        y: NDArray[np.float32],
        kept: NDArray[np.int64],
        x: NDArray[np.float32],
    ) -> NDArray[np.bool_]:
        """The pairs that may repeat each other, (rows, kept); every pair that does is among them."""
        maybe: NDArray[np.bool_] = y @ x.T >= self._cosine - _MARGIN
        if self._contents is not None:
            maybe |= self._contents.pictures[rows][:, None] == self._contents.pictures[kept]
        return maybe

    def _repeats(
        self,
        rows: NDArray[np.int64],
        y: NDArray[np.float32],
        kept: NDArray[np.int64],
        x: NDArray[np.float32],
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """The cosine of each pair, and whether its row repeats the kept one."""
        values = _cosines(y, x)
        near: NDArray[np.bool_] = values >= self._cosine
        if self._contents is None or not len(rows):
            return values, near
        alike = np.zeros(len(rows), np.bool_)
        looked = np.flatnonzero(near | (self._contents.pictures[rows] == self._contents.pictures[kept]))
        alike[looked] = self._contents.likeness(rows[looked], kept[looked]) >= self._contents.least_likeness
        self._removals.spared[rows[near & ~alike]] = True
        return values, alike

    def _note(
        self, rows: NDArray[np.int64], partners: NDArray[np.int64], values: NDArray[np.float64]
    ) -> None:
        self._removals.partner[rows], self._removals.cosine[rows] = partners, values


def _cosines(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float64]:
    """The cosine of each pair of unit rows, in float64. Unlike in a matrix product, each is summed alone."""
    values: NDArray[np.float64] = np.round(np.multiply(x, y, dtype=np.float64).sum(axis=-1), COSINE_DECIMALS)
    return values
