"""Random cells of the dominant subspace: a cheap sense of which rows repeat each other.

Each of `N_TABLES` tables cuts the space by random planes through the mean; a row's cell in a table is the
side of each plane that it lies on (Charikar 2002, "Similarity estimation techniques from rounding
algorithms"). Two rows at an angle θ share a cell of a table with b planes with probability (1 - θ/π)^b.
Near-duplicates share most of theirs, rows that differ hardly any. There is no threshold to set, and the
cost is linear in the rows.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.choice.candidates import Blocks, whole_stream

N_TABLES: Final = 24
"""Measured on generated pools: from 16 tables on, the distinct scenes of a choice hardly change."""

_SEED = 11636  # the planes are part of the method: the same rows lie in the same cells every night
_SPARE_PLANES = 4  # 16 times as many cells as rows are chosen, so that cells do not run out
_FEWEST_PLANES, _MOST_PLANES = 8, 31


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """The cells of n rows.

    Attributes:
        of_row: (n, N_TABLES) int32; the cells of all tables are numbered together.
        n_cells: Number of cells that hold a row, over all tables.
        n_planes: Planes of each table.
    """

    of_row: NDArray[np.int32]
    n_cells: int
    n_planes: int

    def distinct_share(self, rows: NDArray[np.int64]) -> float:
        """The number of different cells that some rows lie in per row, as a mean over tables, in (0, 1].

        1 where no two rows share a cell of any table.

        Args:
            rows: (m,) distinct rows, one or more.
        """
        if not len(rows):
            raise ValueError("Got no rows; the share of distinct cells needs at least 1. Choose some first.")
        return len(np.unique(self.of_row[rows])) / (len(rows) * N_TABLES)


def cells_of(projections: Blocks, n: int, size: int) -> Cells:
    """The cells of all rows; one pass, O(n·k·b) time for b planes, 4·`N_TABLES` bytes for every row.

    Args:
        projections: The rows of U_k (`candidates.projected`), n of them.
        n: Number of rows.
        size: Number of rows to choose. It determines the size of the cells.

    Raises:
        ValueError: The blocks are not n rows of one width of finite values.
    """
    n_planes = min(_MOST_PLANES, max(_FEWEST_PLANES, math.ceil(math.log2(max(1, size))) + _SPARE_PLANES))
    bits = 1 << np.arange(n_planes, dtype=np.uint32)
    codes = np.zeros((n, N_TABLES), np.uint32)
    planes = np.zeros((N_TABLES, 0, n_planes))
    for start, u in whole_stream(projections, n):
        if planes.shape[1] != u.shape[1]:
            planes = np.random.default_rng(_SEED).normal(size=(N_TABLES, u.shape[1], n_planes))
        for table in range(N_TABLES):
            codes[start : start + len(u), table] = (u @ planes[table] > 0) @ bits
    n_cells = 0
    of_row = np.zeros((n, N_TABLES), np.int32)
    for table in range(N_TABLES):
        values, numbers = np.unique(codes[:, table], return_inverse=True)
        of_row[:, table] = numbers + n_cells
        n_cells += len(values)
    return Cells(of_row, n_cells, n_planes)
