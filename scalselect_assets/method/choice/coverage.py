"""Rows of high leverage in every part of the dominant subspace, where top leverage takes one part many times.

Objective: F(S) = Σ over cells of the largest leverage of a chosen row in that cell, with the random cells
of `method.choice.cells`: facility location with "shares a cell" for the similarity. A row adds its leverage
for each of its cells that no chosen row of higher leverage lies in: leverage times novelty.

Guarantee: F is monotone and submodular. Rows are taken greedily, each with at least 1 - ε of the gain of
the best one (ε = `SLACK`), so for a budget of rows F is at least 1 - 1/e - ε of the best possible
(Nemhauser, Wolsey & Fisher 1978; lazy evaluation, Minoux 1978). Ceilings on one label lower that to about
one half. The guarantee is about coverage of the subspace; no accuracy follows from it.

Costs, for n rows and N picks: one pass over the projections, O(n·k) with the constants of `cells_of`; then
O(n log n) for the order of leverage. Whenever the gain of a row is computed again, the row is taken or
its gain has fallen by a share of at least ε. So this happens O(log(range of gains)/ε) times for each row, in
practice a few times. Memory: some 130 bytes for every row.
"""

import heapq
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.choice.candidates import Blocks, Candidates
from scalselect_assets.method.choice.cells import N_TABLES, Cells, cells_of
from scalselect_assets.method.choice.tally import Tally
from scalselect_assets.method.choice.terms import Terms

SLACK: Final = 0.05
"""ε: a row is taken where it adds this much less, relatively, than the best one might."""

_Entry = tuple[float, float, int, int]  # minus the gain, minus the leverage, the tie order, the row


@dataclass(frozen=True, slots=True, eq=False)
class Covered:
    """Rows by what they add to F.

    Attributes:
        order: Every eligible row once, int64: those picked, in the order of picking, then the others by gain.
        gain: (n,) float64, the increase of F by a picked row, or by adding any other row to the final choice,
            for each table; 0 for held and excluded rows.
        n_picked: Number of rows of ``order`` that were picked.
        novelty: Mean of gain / leverage over the picked rows, in [0, 1]: the share of their cells that were
            new.
    """

    order: NDArray[np.int64]
    gain: NDArray[np.float64]
    n_picked: int
    novelty: float


def coverage_order(
    candidates: Candidates, terms: Terms, projections: Blocks, *, slack: float = SLACK
) -> Covered:
    """Rows by what they add to the coverage of the others; ties by leverage, then by tie order.

    Held rows cover their cells from the start. Picking respects the quotas, by means of `Tally`.

    Args:
        candidates: Leverages and tie order.
        terms: The number of rows to pick, the held rows and the quotas.
        projections: The rows of U_k in the order of the candidates.
        slack: ε, from 0 (exactly greedy, and slow where a pool repeats itself) to below 1.

    Raises:
        ValueError: ``slack`` is out of range, or the blocks are not n rows of one width of finite values.
    """
    if not 0 <= slack < 1:
        raise ValueError(f"Got slack {slack}; allowed is 0 to below 1. {SLACK} does well.")
    cells = cells_of(projections, candidates.n, terms.expected_size)
    greedy = _Greedy(candidates, terms, cells, slack)
    picked = greedy.pick()
    gain = np.zeros(candidates.n)
    gain[picked] = greedy.gained
    others = np.flatnonzero(terms.eligible & ~_mask(candidates.n, picked))
    gain[others] = greedy.gains(others)
    leverage = candidates.normalised_leverage
    order = np.lexsort((candidates.tie_order[others], -leverage[others], -gain[others]))
    counted = picked[leverage[picked] > 0]
    return Covered(
        order=np.concatenate([picked, others[order]]),
        gain=gain,
        n_picked=len(picked),
        novelty=float((gain[counted] / leverage[counted]).mean()) if counted.size else 0.0,
    )


class _Greedy:
    """The rows picked so far, and the largest leverage in each cell.

    Attributes:
        gained: The increase of F by each picked row, for each table.
    """

    def __init__(self, candidates: Candidates, terms: Terms, cells: Cells, slack: float) -> None:
        self._slack = slack
        self._leverage, self._tie_order = candidates.normalised_leverage, candidates.tie_order
        self._cells, self._tally = cells.of_row, Tally(terms)
        self._largest = np.zeros(cells.n_cells)
        self.gained: list[float] = []
        for row in np.flatnonzero(terms.held).tolist():
            self._cover(row)
        # No row adds more than its leverage, so this is the order until the gains are computed.
        self._fresh = candidates.by(self._leverage, terms.eligible_rows)

    def pick(self) -> NDArray[np.int64]:
        """The picked rows in order."""
        picked: list[int] = []
        looked_at: list[_Entry] = []
        n_fresh = 0
        while not self._tally.is_full and (looked_at or n_fresh < len(self._fresh)):
            # The gain of a row when it was last computed (at most its leverage) bounds its gain now.
            bound = self._bound(int(self._fresh[n_fresh])) if n_fresh < len(self._fresh) else None
            if bound is not None and (not looked_at or bound < looked_at[0]):
                n_fresh += 1
            else:
                bound = heapq.heappop(looked_at)
            row = bound[-1]
            if not self._tally.admits(np.array([row]))[0]:
                continue
            entry = self._entry(row)
            if entry[0] > bound[0] * (1 - self._slack):
                heapq.heappush(looked_at, entry)
                continue
            picked.append(row)
            self.gained.append(-entry[0])
            self._cover(row)
            self._tally.take(row)
        return np.array(picked, np.int64)

    def gains(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """The increase of F if each of some rows were added, for each table, (m,)."""
        gains = np.empty(len(rows))
        for start in range(0, len(rows), 4096):
            part = rows[start : start + 4096]
            missing = self._leverage[part][:, None] - self._largest[self._cells[part]]
            gains[start : start + 4096] = np.maximum(missing, 0.0).sum(axis=1) / N_TABLES
        return gains

    def _bound(self, row: int) -> _Entry:
        return -self._leverage[row], -self._leverage[row], int(self._tie_order[row]), row

    def _entry(self, row: int) -> _Entry:
        missing = np.maximum(self._leverage[row] - self._largest[self._cells[row]], 0.0)
        return -float(missing.sum()) / N_TABLES, -self._leverage[row], int(self._tie_order[row]), row

    def _cover(self, row: int) -> None:
        own = self._cells[row]
        self._largest[own] = np.maximum(self._largest[own], self._leverage[row])


def _mask(n: int, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    mask = np.zeros(n, np.bool_)
    mask[rows] = True
    return mask
