"""Rows that span the dominant subspace together; rows of large leverage may all be alike.

Leverage scores each row by itself, so two near-duplicates both rank high. Here the score of a row is what it
adds to the other chosen rows: its share in log det M, M = wI + Σ_S u uᵀ over the rows u of U_k
(a D-optimal design in the words of statistics, a determinantal point process' mode in those of machine
learning). A row that is not chosen would add log(1 + uᵀM⁻¹u); removing a chosen one would take away
-log(1 - uᵀM⁻¹u). A near-duplicate adds little, and a missing direction adds much. Once all directions are
present, those that are weakest in the subset add most, so the same rule also works beyond k rows.

Exact greedy reads the pool once for every row that it picks. Here the number of readings is fixed:

1. Picking, as in Badanidiyuru & Vondrák (SODA 2014, "Fast algorithms for maximizing submodular functions"):
   a pass takes every row that still adds at least a threshold, and the threshold falls from pass to pass.
2. Exchange, since the last of few thresholds is coarse, and is reached by early rows of the stream first: a
   pass gives up rows that have come to add less than the N-th best row, and takes others that add at least
   as much. That is what optimal designs without replication are made of (Fedorov 1972, "Theory of optimal
   experiments"; for streams, Pronzato & Wang 2021, "Sequential online subsampling for thinning experimental
   designs").

log det M is concave in M, which bounds how much better any other choice could be: see ``Spanned.gap``.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.choice.candidates import Blocks, Candidates, whole_stream
from scalselect_assets.method.choice.tally import Tally
from scalselect_assets.method.choice.terms import Terms

# M begins as if every direction had this share of what a random choice of the same size gives it: little
# enough that a direction that is not there yet comes before a second row of one that is, even where the
# direction is that of a large part of the pool, and enough to keep the condition of M far from rounding.
DEFAULT_PRIOR = 0.01

# Measured on planted pools of 4000 and 8000 rows (k = 32, 16 % chosen): log det per direction less than 0.01
# below exact greedy's, where top leverage is 0.10 to 0.16 below it. In small pools it is up to 0.02 below
# with three chosen rows for each direction, and up to 0.4 with one.
DEFAULT_PASSES = 10

_FEWEST_PASSES = 3  # one for the lengths of the rows, one to pick, one for what every row adds in the end
_FEWEST_EXCHANGES = 2  # the last one gives nothing up, so that it ends with all rows that are wanted

_ROUNDING = 1e-9  # relative, of what on paper reaches a threshold


@dataclass(frozen=True, slots=True, eq=False)
class Spanned:
    """Rows by what they add.

    Attributes:
        order: Every eligible row once, int64: those picked, then the others, both by ``gain``, ties by tie
            order.
        gain: (n,) float64, the decrease of log det M without a picked row, or its increase by any other row;
            0 for held and excluded rows.
        n_picked: Number of rows of ``order`` that were picked. If the passes end too soon, a few are missing;
            they are then the first of the others, whose gains do not account for each other.
        gap: No choice of as many rows (the size of a budget of rows, the number picked for one of tokens) has
            a log det M larger by more than this for each of the k directions; 0.0 proves the best choice. Far
            above the truth where there are few more rows than directions.
        n_passes: Number of times that the blocks were read.
        prior_weight: w.
    """

    order: NDArray[np.int64]
    gain: NDArray[np.float64]
    n_picked: int
    gap: float
    n_passes: int
    prior_weight: float


def spanning_order(
    candidates: Candidates,
    terms: Terms,
    projections: Blocks,
    *,
    passes: int = DEFAULT_PASSES,
    prior: float = DEFAULT_PRIOR,
) -> Spanned:
    """Rows in the order of the amount that they add to the span of the others.

    The held rows are in M from the start. Inside a block the row that adds most comes first, ties by tie
    order; the order of blocks matters, since rows of earlier blocks are seen first at each threshold. The
    same rows in the same order and blocks give the same choice.

    Picking respects the quotas, by means of `Tally`; rows are exchanged only for others of the same
    combination of labels. With a budget of tokens, a row is exchanged for one other row, so the choice may
    be some rows too long or too short once `taking.take` has gone through the order.

    Costs, for n rows of width k and N picks in blocks of b rows: at most ``passes`` readings, O(n·k²) time
    each (as much as the projections themselves cost where d = k), O(b·k + k²) for each pick and exchange;
    memory of one block, some k × k matrices and some arrays of n numbers.

    Args:
        candidates: Used for the tie order only; leverages are taken from the projections.
        terms: The number of rows to pick, the held rows and the quotas.
        projections: The rows of U_k in the order of the candidates (`candidates.projected`). They are read
            several times: where vectors are slow to read or wide, keep them projected.
        passes: At least 3; more come nearer to the best choice.
        prior: Above 0; w is this times N/n.

    Raises:
        ValueError: ``passes`` or ``prior`` is out of range, or the blocks are not n rows of one width of
            finite values.
    """
    if passes < _FEWEST_PASSES:
        raise ValueError(f"Got {passes} passes; allowed is {_FEWEST_PASSES} or more. Raise the number.")
    if not (math.isfinite(prior) and prior > 0):
        raise ValueError(
            f"Got prior {prior}; allowed is any finite number above 0. {DEFAULT_PRIOR} does well."
        )
    design = _Design(candidates.tie_order, terms, projections, prior * terms.expected_size / terms.n)
    # Two thirds: exchanging rows improved the choice more than finer thresholds did, at any number of passes.
    n_exchanges = 2 * (passes - _FEWEST_PASSES) // 3
    if n_exchanges < _FEWEST_EXCHANGES:
        n_exchanges = 0
    refreshes = 2 if n_exchanges else 1
    for n_left in range(passes - 1 - refreshes - n_exchanges, 0, -1):
        if not design.pick(n_left):
            break
    if n_exchanges:
        design.refresh()
        for n_left in range(passes - design.n_passes - 1, 0, -1):
            if not design.exchange(may_give_up=n_left > 1):
                break
    design.refresh()
    gain = design.gain()
    picked = design.chosen
    return Spanned(
        order=np.concatenate(
            [
                candidates.by(gain, np.flatnonzero(picked)),
                candidates.by(gain, np.flatnonzero(terms.eligible & ~picked)),
            ]
        ),
        gain=gain,
        n_picked=int(np.count_nonzero(picked)),
        gap=design.gap(),
        n_passes=design.n_passes,
        prior_weight=design.weight,
    )


class _Design:
    """The rows chosen so far, beside the held ones.

    Attributes:
        chosen: (n,) bool.
        n_passes: Number of times that the stream has been read.
        weight: w.
    """

    def __init__(
        self, tie_order: NDArray[np.int64], terms: Terms, projections: Blocks, weight: float
    ) -> None:
        """Read all rows once, with the held ones in M."""
        self._tie_order, self._terms, self._projections = tie_order, terms, projections
        self.weight = weight
        self.chosen = np.zeros(terms.n, dtype=bool)
        self.n_passes = 1
        # uᵀM⁻¹u of each row when it was last computed.
        self._forms = np.zeros(terms.n)
        self._matrix = np.zeros((0, 0))
        for start, u in whole_stream(projections, terms.n):
            if not start:
                self._matrix = weight * np.eye(u.shape[1])
            self._forms[start : start + len(u)] = np.einsum("ij,ij->i", u, u)
            held = u[terms.held[start : start + len(u)]]
            self._matrix += held.T @ held
        self._inverse = np.linalg.inv(self._matrix)
        # M is at most (1 + w)I, since the whole pool's Gram matrix is I. So the rows of largest leverage
        # always add at least this much: without quotas, such a threshold completes the choice.
        self._lowest = self._smallest_needed() / (1 + weight)
        self._forms /= weight
        self._tally = Tally(terms)
        # By combination of labels, the number of chosen rows and the number to choose; known after picking.
        self._cells = terms.cells
        self._counts = self._wanted = np.zeros(0, dtype=np.int64)

    def pick(self, n_left: int) -> bool:
        """Take all rows that add at least a threshold. All needed rows reach the last of ``n_left`` ones.

        Returns:
            Whether there was anything to take.
        """
        rows = np.flatnonzero(self._terms.eligible & ~self.chosen & (self._forms > 0))
        rows = rows[self._tally.admits(rows)]
        if self._tally.is_full or not rows.size or self._lowest == 0:
            return False
        # These values are stale, and so upper bounds, because M only grows.
        best = float(self._forms[rows].max())
        threshold = best * min(1.0, self._lowest / best) ** (1 / n_left) * (1 - _ROUNDING)
        for start, u in self._stream():
            if self._tally.is_full:
                continue
            forms = self._forms[start : start + len(u)]
            open_rows = self._terms.eligible[start : start + len(u)] & ~self.chosen[start : start + len(u)]
            here = np.flatnonzero(open_rows & (forms >= threshold))
            self._take(start + here, u[here], np.full(len(here), threshold))
        return True

    def exchange(self, *, may_give_up: bool) -> bool:
        """Give up rows that add less than the last of the best N; take others that add as much.

        Returns:
            Whether anything changed.
        """
        if not self._wanted.size:
            self._wanted = np.bincount(self._cells[self.chosen], minlength=int(self._cells.max()) + 1)
            self._counts = self._wanted.copy()
        thresholds = self._thresholds() if may_give_up else self._thresholds_to_complete()
        before = self.chosen.copy()
        for start, u in self._stream():
            rows = start + np.flatnonzero(self._terms.eligible[start : start + len(u)])
            block, least = u[rows - start], thresholds[self._cells[rows]]
            if may_give_up:
                own = np.flatnonzero(self.chosen[rows])
                self._give_up(rows[own], block[own], least[own])
            others = np.flatnonzero(~self.chosen[rows])
            self._take(rows[others], block[others], least[others])
            self._forms[rows] = self._forms_of(block)
        return bool((before != self.chosen).any())

    def refresh(self) -> None:
        """Compute the amount that each row adds again."""
        for start, u in self._stream():
            self._forms[start : start + len(u)] = self._forms_of(u)

    def gain(self) -> NDArray[np.float64]:
        """The decrease of log det M without a chosen row, or increase by another, (n,); after `refresh`."""
        gain = np.log1p(np.where(self._terms.eligible, self._added(), 0.0))
        return np.asarray(gain, dtype=np.float64)

    def gap(self) -> float:
        """Upper bound on the increase of log det M / k by choosing other rows; after `refresh`.

        By concavity, log det M' - log det M <= tr(M⁻¹(M' - M)): the sum of the forms of other rows, less that
        of these.
        """
        k, size = len(self._matrix), int(np.count_nonzero(self.chosen))
        if self._terms.size is not None:
            size = self._terms.size - self._terms.n_held
        forms = self._forms[self._terms.eligible]
        largest = (
            np.partition(forms, len(forms) - size)[len(forms) - size :] if 0 < size < len(forms) else forms
        )
        best = float(largest.sum()) if size else 0.0
        return max(0.0, best - float(self._forms[self.chosen].sum())) / k if k else 0.0

    def _stream(self) -> Iterable[tuple[int, NDArray[np.float64]]]:
        # Every update of the inverse adds some rounding, so each pass computes it anew.
        self._inverse = np.linalg.inv(self._matrix)
        self.n_passes += 1
        return whole_stream(self._projections, self._terms.n)

    def _take(self, rows: NDArray[np.int64], u: NDArray[np.float64], least: NDArray[np.float64]) -> None:
        """Take the rows not yet chosen that add at least ``least`` (m,), the one that adds most first."""
        forms = self._forms[rows] = self._forms_of(u)
        enough = np.flatnonzero(forms >= least)
        enough = enough[np.argsort(self._tie_order[rows[enough]])]
        rows, u, least, forms = rows[enough], u[enough], least[enough], forms[enough]
        while rows.size:
            possible = (forms >= least) & ~self.chosen[rows] & self._admits(rows)
            best = int(np.where(possible, forms, -1.0).argmax())
            if not possible[best]:
                break
            self.chosen[rows[best]] = True
            self._count(int(rows[best]), 1)
            self._change(u, forms, best, 1)
        self._forms[rows] = np.maximum(forms, 0.0)

    def _give_up(self, rows: NDArray[np.int64], u: NDArray[np.float64], least: NDArray[np.float64]) -> None:
        """Give up the chosen rows that add less than ``least`` (m,), the one farthest below first."""
        forms = self._forms_of(u)
        # Giving up others only raises what a row adds.
        weak = np.flatnonzero(_without(forms) < least)
        weak = weak[np.argsort(self._tie_order[rows[weak]])]
        rows, u, least, forms = rows[weak], u[weak], least[weak], forms[weak]
        while rows.size:
            missing = np.where(self.chosen[rows], least - _without(forms), 0.0)
            worst = int(missing.argmax())
            if missing[worst] <= 0:
                break
            self.chosen[rows[worst]] = False
            self._count(int(rows[worst]), -1)
            self._change(u, forms, worst, -1)

    def _change(self, u: NDArray[np.float64], forms: NDArray[np.float64], index: int, sign: int) -> None:
        """Add (1) or take away (-1) one of the rows ``u`` from M, and bring their forms up to date."""
        update = self._inverse @ u[index]
        scale = sign / (1 + sign * float(forms[index]))
        self._matrix += sign * np.outer(u[index], u[index])
        self._inverse -= np.outer(update, scale * update)
        forms -= scale * np.square(u @ update)

    def _admits(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        if not self._wanted.size:
            return self._tally.admits(rows)
        fits: NDArray[np.bool_] = (self._counts < self._wanted)[self._cells[rows]]
        return fits

    def _count(self, row: int, change: int) -> None:
        if self._wanted.size:
            self._counts[self._cells[row]] += change
        else:
            self._tally.take(row)

    def _forms_of(self, u: NDArray[np.float64]) -> NDArray[np.float64]:
        forms: NDArray[np.float64] = np.einsum("ij,ij->i", u @ self._inverse, u)
        return np.maximum(forms, 0.0)

    def _added(self) -> NDArray[np.float64]:
        """uᵀM⁻¹u with the M of the other chosen rows, (n,)."""
        return np.where(self.chosen, _without(self._forms), self._forms)

    def _thresholds(self) -> NDArray[np.float64]:
        """By cell, the amount that the last of the wanted number of best rows adds."""
        return _nth_by_cell(self._added(), np.flatnonzero(self._terms.eligible), self._cells, self._wanted)

    def _thresholds_to_complete(self) -> NDArray[np.float64]:
        """By cell, the amount that the last of the best missing rows adds when those rows are taken."""
        missing = self._wanted - self._counts
        rows = np.flatnonzero(self._terms.eligible & ~self.chosen)
        thresholds = _nth_by_cell(self._forms, rows, self._cells, missing)
        # Each of them reduces the amounts of the others, in all by about their share of the choice.
        return thresholds * (1 - missing / np.maximum(self._wanted, 1))

    def _smallest_needed(self) -> float:
        """The smallest leverage above 0 among the largest, as many as rows to pick; 0.0 if there is none."""
        leverage = self._forms[self._terms.eligible]
        size = min(len(leverage), self._terms.expected_size - self._terms.n_held)
        if size < 1:
            return 0.0
        largest = np.partition(leverage, len(leverage) - size)[len(leverage) - size :]
        return float(largest[largest > 0].min()) if (largest > 0).any() else 0.0


def _without(forms: NDArray[np.float64]) -> NDArray[np.float64]:
    """The uᵀM⁻¹u of chosen rows with the M of the others. ``forms`` is below 1 because w is above 0."""
    rest = np.maximum(1 - forms, np.finfo(np.float64).eps)
    return np.asarray(forms / rest, dtype=np.float64)


def _nth_by_cell(
    values: NDArray[np.float64], rows: NDArray[np.int64], cells: NDArray[np.int64], wanted: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The ``wanted``-th largest value of the rows of each cell; infinite where none is wanted or exists."""
    ordered = rows[np.lexsort((-values[rows], cells[rows]))]
    n_in = np.bincount(cells[rows], minlength=len(wanted))
    first = np.cumsum(n_in) - n_in
    nth = np.full(len(wanted), np.inf)
    known = (wanted > 0) & (n_in > 0)
    nth[known] = values[ordered[(first + np.minimum(wanted, n_in) - 1)[known]]]
    return nth
