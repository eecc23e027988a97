"""The distribution of leverage over a pool, counted in one pass over the scores, shard by shard."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.charts.chart_data import LeverageBin

_PER_OCTAVE: Final = 64
_PER_BIN: Final = _PER_OCTAVE // 4
_LOWEST, _HIGHEST = -12, 40  # in powers of 2; n/k, the largest possible score, stays far below the upper end
_GRID: NDArray[np.float64] = 2.0 ** (
    np.arange(_LOWEST * _PER_OCTAVE, _HIGHEST * _PER_OCTAVE + 1, dtype=np.float64) / _PER_OCTAVE
)


class LeverageCounts:
    """Counts of normalised scores on a fixed grid of 64 values per octave.

    Counts add, so neither the order of the shards nor how the pool is cut into them matters. Memory: 27 kB.
    """

    def __init__(self) -> None:
        # The first count is of all below the grid, those of 0 included, and the last of all above it.
        self._counts: NDArray[np.int64] = np.zeros(len(_GRID) + 1, np.int64)

    @property
    def n(self) -> int:
        """Number of scores so far."""
        return int(self._counts.sum())

    def add(self, normalised: NDArray[np.float64]) -> None:
        """Count scores, (m,) float64, not negative."""
        places = np.searchsorted(_GRID, normalised, side="right")
        self._counts += np.bincount(places, minlength=len(self._counts))

    def bins(self, selected: "LeverageCounts") -> tuple[LeverageBin, ...]:
        """The histogram from the first to the last bin that is not empty, and of the selected among them."""
        pool, chosen = self._binned(), selected._binned()
        filled = np.flatnonzero(pool)
        if not filled.size:
            return ()
        bounds = [0.0, *_GRID[::_PER_BIN].tolist(), float("inf")]
        return tuple(
            LeverageBin(bounds[index], bounds[index + 1], int(pool[index]), int(chosen[index]))
            for index in range(filled[0], filled[-1] + 1)
        )

    def rank_curve(self, n_points: int = 160) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Ranks, ascending, and for each the largest value of the grid that so many scores reach.

        Scores below the grid (2^-12) are left out. Evenly spread over the ranks, with the first and the last.
        """
        at_least = self._counts[::-1].cumsum()[::-1][1:]  # by value of the grid, how many scores reach it
        values, ranks = _GRID[::-1], at_least[::-1]  # ascending in rank
        # Of the values that equally many scores reach, the largest.
        ranks, first = np.unique(ranks, return_index=True)
        values = values[first]
        there = ranks > 0
        ranks, values = ranks[there], values[there]
        if len(ranks) > n_points:
            wanted = np.linspace(ranks[0], ranks[-1], n_points)
            kept = np.unique(np.searchsorted(ranks, wanted))
            ranks, values = ranks[kept], values[kept]
        return tuple(int(rank) for rank in ranks), tuple(float(value) for value in values)

    def _binned(self) -> NDArray[np.int64]:
        """Counts by quarter octaves, with what lies below and above the grid at the ends."""
        inner = self._counts[1:-1].reshape(-1, _PER_BIN).sum(axis=1)
        return np.concatenate([self._counts[:1], inner, self._counts[-1:]])
