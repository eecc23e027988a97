"""The nearest cosines between samples of a pool, and the threshold that follows for near-duplicates.

The meaning of a cosine of 0.995 depends on the model and the pool. So the pool itself gives the scale: for
some rows, the nearest row that shows other pictures *and* says something else, which is no duplicate whatever
its cosine. The suggested threshold is the cosine that only one in a hundred of these innocent neighbours
reaches.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.choice.near_duplicates import COSINE_DECIMALS, Contents

INNOCENT_SHARE: Final = 0.01
"""At the suggested threshold, this share of the rows has an innocent neighbour."""

LEAST_SUGGESTED: Final = 0.9
"""The lowest suggestion: small pools of very different rows would suggest that everything is near."""

_NEIGHBOURS = 16  # kept for each row; where all of them are alike, the last one bounds the innocent one
_SUGGESTED_DECIMALS = 4


@dataclass(frozen=True, slots=True, eq=False)
class NearestCosines:
    """The nearest neighbours of q rows of a pool.

    Attributes:
        nearest: (q,) float64, the cosine with the nearest other row.
        innocent: (q,) float64, with the nearest one of other pictures and another text, or a bound above it.
    """

    nearest: NDArray[np.float64]
    innocent: NDArray[np.float64]

    def suggested(self) -> float:
        """The threshold, in [`LEAST_SUGGESTED`, 1], rounded up."""
        if not len(self.innocent):
            return LEAST_SUGGESTED
        scale = 10**_SUGGESTED_DECIMALS
        reached = float(np.quantile(self.innocent, 1 - INNOCENT_SHARE, method="higher"))
        return float(min(1.0, max(LEAST_SUGGESTED, math.ceil(round(reached * scale, 2)) / scale)))


def nearest_cosines(
    rows: NDArray[np.int64],
    x: NDArray[np.float32],
    pool: Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]],
    contents: Contents,
) -> NearestCosines:
    """The nearest neighbours of some rows among all rows of a pool; one pass, q·n·d multiplications.

    Args:
        rows: (q,) positions.
        x: (q, d) unit vectors of these rows.
        pool: All positions and unit vectors, in batches.
        contents: Pictures and texts of all rows.
    """
    cosines = np.full((len(rows), 0), -1.0, np.float32)
    positions = np.zeros((len(rows), 0), np.int64)
    for batch, y in pool:
        values = x @ y.T
        values[rows[:, None] == batch] = -np.inf
        cosines = np.concatenate([cosines, values], axis=1)
        positions = np.concatenate([positions, np.broadcast_to(batch, values.shape)], axis=1)
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :_NEIGHBOURS]
        cosines = np.take_along_axis(cosines, best, axis=1)
        positions = np.take_along_axis(positions, best, axis=1)
    there = np.isfinite(cosines)
    if not there.any():
        return NearestCosines(np.empty(0), np.empty(0))
    rounded: NDArray[np.float64] = np.clip(
        np.round(cosines.astype(np.float64), COSINE_DECIMALS), -1.0, 1.0
    ).astype(np.float64)
    first, second = np.repeat(rows, cosines.shape[1]), positions.reshape(-1)
    alike = (contents.pictures[first] == contents.pictures[second]) | (
        contents.likeness(first, second) >= contents.least_likeness
    )
    innocent = there & ~alike.reshape(cosines.shape)
    last = np.maximum(there.sum(axis=1) - 1, 0)
    place = np.where(innocent.any(axis=1), innocent.argmax(axis=1), last)
    each = np.arange(len(rows))
    return NearestCosines(rounded[:, 0], rounded[each, place])
