"""Rows that span the dominant subspace together, where rows of large leverage may all say the same.

Leverage scores a row as if it were alone, so that of two near-duplicates both rank high. Here a row counts
for what it adds to those chosen before it: the gain in log det(wI + Σ_S u uᵀ) over the rows u of U_k, which
is log(1 + uᵀM⁻¹u) with M the matrix in brackets (a D-optimal design in the words of statistics, a
determinantal point process' greedy mode in those of machine learning). A near-duplicate adds little; a
direction that is not there yet adds much; once all directions are there, those that are weakest in the subset
add most, so the choice goes on in the same sense beyond k rows.

The gain is monotone and submodular, so greedy choices come near the optimum. Exact greedy reads the pool
once per row; as in Badanidiyuru & Vondrák (SODA 2014, "Fast algorithms for maximizing submodular
functions"), each pass here takes every row whose gain still reaches a threshold, and the threshold falls from
pass to pass. Theirs falls by a fixed factor; here it falls so that the number of passes has a given bound.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.candidates import Blocks, Candidates, whole_stream
from scalselect_assets.method.quotas import Tally, Terms

# M begins as if every direction had this share of what a random choice of the same size gives it: little
# enough that a direction that is not there yet comes before a second row of one that is, even where the
# direction is that of a large part of the pool, and enough to keep the condition of M far from rounding.
DEFAULT_PRIOR = 0.01

DEFAULT_PASSES = 10
_FEWEST_PASSES = 3  # one for the lengths of the rows, one to choose, one for what the others would still add

_ROUNDING = 1e-9  # relative, of a gain that on paper reaches the last threshold


@dataclass(frozen=True, slots=True, eq=False)
class Spanned:
    """Rows in the order in which they add most.

    Attributes:
        order: Every eligible row once, int64: those picked, in the order in which they were, then the others
            by what they would still add, ties by tie order.
        gain: (n,) float64, increase of log det M: of a picked row when it was picked, of any other row after
            all picks. 0 for held rows.
        n_picked: How many rows of ``order`` were picked.
        gain_ratio: Every pick had at least this share of the largest gain that any admissible row had then.
            The log-determinant's increase is therefore at least 1 - exp(-gain_ratio) of the largest possible
            one, where there are no quotas. 1.0 if nothing was picked.
        n_passes: How often the blocks were read.
        prior_weight: w.
    """

    order: NDArray[np.int64]
    gain: NDArray[np.float64]
    n_picked: int
    gain_ratio: float
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
    """Rows in the order in which they add most to the span of those before them.

    The held rows are in M from the start. Inside a block the row of largest gain comes first, ties by tie
    order; the order of blocks matters, since rows of earlier blocks are seen first at each threshold. The
    same rows in the same order and blocks give the same choice.

    Costs, for n rows of width k and N picks in blocks of b rows: at most ``passes`` readings, O(n·k²) time
    each (as much as the projections themselves cost where d = k), O(N·(b·k + k²)) for the picks; memory of
    one block, three k × k matrices and some arrays of n numbers.

    Args:
        candidates: For the tie order only; leverages are taken from the projections.
        terms: How many rows to pick, held rows, and quotas, which are kept to while picking as `Tally` does.
        projections: The rows of U_k in the order of the candidates (`candidates.projected`). They are read
            several times: where vectors are slow to read or wide, keep them projected.
        passes: At least 3; more give a larger ``gain_ratio``.
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
    weight = prior * terms.expected_size / terms.n
    leverage, gram = _first_pass(terms, projections)
    picking = _Picking(candidates.tie_order, terms, leverage, gram, weight)
    smallest = _smallest_needed(leverage[terms.eligible], terms) / (1 + weight)
    n_passes = 1
    for n_left in range(passes - 2, 0, -1):
        best = picking.largest_gain()
        if picking.tally.is_full or best <= 0:
            break
        # M is at most (1 + w)I, since the whole pool's Gram matrix is I, so that the rows of largest leverage
        # reach `smallest` to the end: without quotas, the last of these thresholds completes the choice.
        step = (min(smallest, best) / best) ** (1 / n_left)
        picking.run_pass(projections, best * step * (1 - _ROUNDING))
        n_passes += 1
    picking.refresh(projections)
    gain = np.where(terms.held, 0.0, np.log1p(np.maximum(picking.bound, 0.0)))
    gain[picking.picked] = picking.gains
    rest = terms.eligible.copy()
    rest[picking.picked] = False
    return Spanned(
        order=np.concatenate(
            [np.array(picking.picked, dtype=np.int64), candidates.by(gain, np.flatnonzero(rest))]
        ),
        gain=gain,
        n_picked=len(picking.picked),
        gain_ratio=picking.ratio,
        n_passes=n_passes + 1,
        prior_weight=weight,
    )


def _first_pass(terms: Terms, projections: Blocks) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The leverages (n,) of all rows, and the Gram matrix (k, k) of the held ones."""
    leverage = np.empty(terms.n)
    gram = np.zeros((0, 0))
    for start, u in whole_stream(projections, terms.n):
        if not start:
            gram = np.zeros((u.shape[1], u.shape[1]))
        leverage[start : start + len(u)] = np.einsum("ij,ij->i", u, u)
        held = u[terms.held[start : start + len(u)]]
        gram += held.T @ held
    return leverage, gram


def _smallest_needed(leverage: NDArray[np.float64], terms: Terms) -> float:
    """The smallest leverage above 0 of as many of the largest as are to be picked; 0.0 if there is none."""
    size = min(len(leverage), max(1, terms.expected_size - terms.n_held))
    if not size:
        return 0.0
    largest = np.partition(leverage, len(leverage) - size)[len(leverage) - size :]
    return float(largest[largest > 0].min(initial=np.inf)) if (largest > 0).any() else 0.0


class _Picking:
    """The picks so far.

    Attributes:
        tally: What the terms still allow.
        bound: (n,) float64; uᵀM⁻¹u when the row was last looked at, an upper bound of what it is now, since M
            only grows. -1 for rows that are picked, held or excluded.
        picked: The rows, in order.
        gains: log(1 + uᵀM⁻¹u) of each, then.
        ratio: See ``Spanned.gain_ratio``.
    """

    def __init__(
        self,
        tie_order: NDArray[np.int64],
        terms: Terms,
        leverage: NDArray[np.float64],
        gram: NDArray[np.float64],
        weight: float,
    ) -> None:
        self._tie_order, self._terms = tie_order, terms
        self._matrix = gram + weight * np.eye(len(gram))
        self._inverse = np.linalg.inv(self._matrix)
        self.tally = Tally(terms)
        self.bound = np.where(terms.eligible, leverage / weight, -1.0)
        self.picked: list[int] = []
        self.gains: list[float] = []
        self.ratio = 1.0

    def largest_gain(self) -> float:
        """An upper bound of uᵀM⁻¹u over the rows that may still be picked; 0.0 where there is none."""
        open_rows = np.flatnonzero(self.bound > 0)
        open_rows = open_rows[self.tally.admits(open_rows)]
        return float(self.bound[open_rows].max(initial=0.0))

    def run_pass(self, projections: Blocks, threshold: float) -> None:
        """Pick every admissible row whose uᵀM⁻¹u reaches ``threshold`` when it is seen."""
        share = threshold / self.largest_gain()
        n_before = len(self.picked)
        # Every rank-one update of the inverse adds some rounding; each pass begins without.
        self._inverse = np.linalg.inv(self._matrix)
        for start, u in whole_stream(projections, self._terms.n):
            if not self.tally.is_full:
                self._pick_from(start, u, threshold)
        if len(self.picked) > n_before:
            self.ratio = min(self.ratio, share)

    def refresh(self, projections: Blocks) -> None:
        """Make every bound exact."""
        self._inverse = np.linalg.inv(self._matrix)
        for start, u in whole_stream(projections, self._terms.n):
            bound = self.bound[start : start + len(u)]
            open_rows = np.flatnonzero(bound >= 0)
            bound[open_rows] = self._forms(u[open_rows])

    def _forms(self, u: NDArray[np.float64]) -> NDArray[np.float64]:
        forms: NDArray[np.float64] = np.einsum("ij,ij->i", u @ self._inverse, u)
        return np.maximum(forms, 0.0)

    def _pick_from(self, start: int, u: NDArray[np.float64], threshold: float) -> None:
        rows = start + np.flatnonzero(self.bound[start : start + len(u)] >= threshold)
        if not rows.size:
            return
        rows = rows[np.argsort(self._tie_order[rows])]
        forms = self.bound[rows] = self._forms(u[rows - start])
        rows, forms = rows[forms >= threshold], forms[forms >= threshold]
        u = u[rows - start]
        taken: list[int] = []
        while rows.size:
            candidates = (
                np.where(self.tally.admits(rows), forms, -1.0) if self.tally.is_constrained else forms
            )
            best = int(candidates.argmax())
            form = float(candidates[best])
            if form < threshold or self.tally.is_full:
                break
            update = self._inverse @ u[best]
            self._inverse -= np.outer(update, update / (1 + form))
            forms -= np.square(u @ update) / (1 + form)
            forms[best] = -np.inf
            self.tally.take(int(rows[best]))
            self.picked.append(int(rows[best]))
            self.gains.append(math.log1p(form))
            taken.append(best)
        self._matrix += u[taken].T @ u[taken]
        self.bound[rows] = np.maximum(forms, 0.0)
        self.bound[rows[taken]] = -1.0
