"""The terms of a choice, and the first choice in an order of preference that keeps to them.

Terms are a budget in rows or tokens, floors and ceilings by label, and rows that must or must not be chosen.

What is optimal and what is greedy. `Terms.take` goes through the rows from the most preferred on and takes
each one with which the terms can still be met, so it gives the lexicographically first admissible choice.

- A budget in rows with quotas on at most one column: the admissible sets are those of a matroid, so the
  choice also has the largest total score of all admissible ones, whatever scores the order sorts by.
- A budget in rows with quotas on several columns: whether the terms can still be met is decided exactly (an
  integer programme over the combinations of labels), the total score is greedy's, not always the largest.
- A budget in tokens: rows that no longer fit are passed over and cheaper ones taken after them. Greedy: the
  largest total score would be a knapsack problem.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

BudgetUnit = Literal["rows", "image_tokens", "text_tokens"]
_MILP_INFEASIBLE = 2  # scipy.optimize.milp's status


class InfeasibleError(ValueError):
    """No choice meets the terms; the message says which numbers contradict each other."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be spent.

    Attributes:
        amount: A count (int), or a fraction in (0, 1] of all rows' total (float).
        unit: What is counted. A budget of rows is spent exactly; one of tokens is not exceeded.
    """

    amount: int | float
    unit: BudgetUnit = "rows"


@dataclass(frozen=True, slots=True)
class Quota:
    """How many rows of a label are chosen, at least and at most; labels that are not named are free.

    Attributes:
        column: Name of the column of labels.
        floors: By label: rows (int), or a share in [0, 1] of a budget of rows (float), rounded up.
        ceilings: The same, rounded down.
    """

    column: str
    floors: Mapping[str, int | float] = field(default_factory=dict)
    ceilings: Mapping[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """A quota in numbers; all labels that it does not name are one.

    Attributes:
        name: Of the column.
        values: The labels, c of them.
        codes: (n,) int64, positions in ``values``.
        floors: (c,) int64, rows; 0 where there is none.
        ceilings: (c,) int64, rows; the number of rows there are where there is none.
    """

    name: str
    values: tuple[str, ...]
    codes: NDArray[np.int64]
    floors: NDArray[np.int64]
    ceilings: NDArray[np.int64]

    def counts(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many of ``rows`` have each label, (c,) int64."""
        return np.bincount(self.codes[rows], minlength=len(self.values)).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """Terms that are known to be feasible; made by `agree`.

    Attributes:
        n: Number of candidates.
        size: Rows to choose, the held ones included; None with a budget of tokens.
        tokens: Tokens that may be spent; None with a budget of rows.
        costs: (n,) int64 tokens; None with a budget of rows.
        held: (n,) bool, rows that must be chosen.
        eligible: (n,) bool, rows that may be chosen or not: neither held nor excluded.
        columns: Quotas, by column.
    """

    n: int
    size: int | None
    tokens: int | None
    costs: NDArray[np.int64] | None
    held: NDArray[np.bool_]
    eligible: NDArray[np.bool_]
    columns: tuple[Column, ...]

    @property
    def eligible_rows(self) -> NDArray[np.int64]:
        """The rows that may be chosen or not, ascending."""
        return np.flatnonzero(self.eligible)

    @property
    def n_held(self) -> int:
        """How many rows must be chosen."""
        return int(np.count_nonzero(self.held))

    @property
    def expected_size(self) -> int:
        """``size``, or what a budget of tokens buys of rows of average cost; at least 1, at most n."""
        if self.size is not None:
            return self.size
        tokens, costs = self._tokens_and_costs()
        allowed = self.held | self.eligible
        bought = tokens * int(np.count_nonzero(allowed)) // max(1, int(costs[allowed].sum()))
        return max(1, self.n_held, min(int(np.count_nonzero(allowed)), bought))

    @property
    def cells(self) -> NDArray[np.int64]:
        """The combination of labels that each row has, as a number, (n,) int64; rows of one count alike."""
        if not self.columns:
            return np.zeros(self.n, dtype=np.int64)
        return _combinations(self.columns)[1]

    def take(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first choice in an order of preference that meets the terms.

        Costs O(n log n) with a budget of rows and quotas on up to one column. With quotas on several, an
        integer programme over the combinations of named labels is solved some twenty times for each of them.

        Args:
            order: Every eligible row once, most preferred first; int64.

        Returns:
            The held rows, ascending, then the rows taken, in order; int64.

        Raises:
            ValueError: ``order`` is not an order of the eligible rows.
        """
        if len(order) != np.count_nonzero(self.eligible) or not np.array_equal(
            np.sort(order), self.eligible_rows
        ):
            raise ValueError(
                f"Got an order of {len(order)} rows; expected each of the "
                f"{np.count_nonzero(self.eligible)} eligible rows once. Rank all of them."
            )
        taken = self._take_rows(order) if self.size is not None else self._take_tokens(order)
        return np.concatenate([np.flatnonzero(self.held), taken])

    def with_at_most(self, limit: int, marked: NDArray[np.bool_]) -> "Terms":
        """The same terms and one more: at most ``limit`` of some rows, or as few more as can be.

        For budgets of rows. Where there are quotas, it costs one integer programme, and one more for each
        doubling of the budget where the limit is too low.

        Args:
            limit: How many of the rows are wanted at most.
            marked: (n,) bool, the rows.
        """
        size, allowed = self.size or 0, self.held | self.eligible
        low = max(
            limit,
            int(np.count_nonzero(marked & self.held)),
            size - int(np.count_nonzero(~marked & allowed)),
        )
        free = np.array([self.n, 0], dtype=np.int64)

        def bounded(most: int) -> Terms:
            ceilings = free + np.array([0, most], dtype=np.int64)
            column = Column("(marked)", ("(others)", "(marked)"), marked.astype(np.int64), 0 * free, ceilings)
            return replace(self, columns=(*self.columns, column))

        def can_be_met(terms: Terms) -> bool:
            cells = Cells(terms)
            return cells.feasible(cells.counts(np.flatnonzero(terms.held)))

        high = max(low, size)  # as many as there are rows to choose, so that it excludes nothing
        if can_be_met(bounded(low)):
            return bounded(low)
        while high - low > 1:
            middle = (low + high) // 2
            if can_be_met(bounded(middle)):
                high = middle
            else:
                low = middle
        return bounded(high)

    def spent(self, rows: NDArray[np.int64]) -> int:
        """What ``rows`` cost: tokens, or rows."""
        return len(rows) if self.costs is None else int(self.costs[rows].sum())

    def _take_rows(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        left = (self.size or 0) - self.n_held
        if not self.columns:
            return order[:left]
        cells = Cells(self)
        counts = cells.counts(np.flatnonzero(self.held))
        taken: list[NDArray[np.int64]] = []
        while left:
            # Once a row of a cell cannot be taken, none of that cell can be later: what has been taken since
            # only narrows what is left. So each round closes a cell, or is the last one.
            low, high = 0, min(left, len(order))
            if cells.feasible(counts + cells.counts(order[:high])):
                low = high
            while high - low > 1:
                middle = (low + high) // 2
                if cells.feasible(counts + cells.counts(order[:middle])):
                    low = middle
                else:
                    high = middle
            taken.append(order[:low])
            counts += cells.counts(order[:low])
            left -= low
            if left:
                order = order[low:]
                order = order[cells.codes[order] != cells.codes[order[0]]]
        return np.concatenate(taken) if taken else order[:0]

    def _take_tokens(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        tokens, costs = self._tokens_and_costs()
        left = tokens - int(costs[self.held].sum())
        counts = [column.counts(self.held) for column in self.columns]
        reserve = Reserve(self, costs)
        left -= reserve.cost
        taken = []
        for row in order.tolist():
            labels = [int(column.codes[row]) for column in self.columns]
            if any(
                count[label] >= column.ceilings[label]
                for column, count, label in zip(self.columns, counts, labels, strict=True)
            ):
                continue
            released = reserve.released_by(row)
            if costs[row] - released <= left:
                left -= int(costs[row]) - released
                reserve.take(row)
                taken.append(row)
                for count, label in zip(counts, labels, strict=True):
                    count[label] += 1
        return np.array(taken, dtype=np.int64)

    def _tokens_and_costs(self) -> tuple[int, NDArray[np.int64]]:
        if self.tokens is None or self.costs is None:
            raise ValueError("Got a budget of rows; only one of tokens has costs. Ask for its size.")
        return self.tokens, self.costs


class Cells:
    """The combinations of labels that occur, and whether numbers of rows in them can grow into a choice."""

    def __init__(self, terms: Terms) -> None:
        self._size = terms.size or 0
        self._columns = terms.columns
        combinations, self.codes = _combinations(terms.columns)
        # (labels, cells) by column: which cells a label is made of.
        self._members = [
            np.arange(len(column.values))[:, None] == combination
            for column, combination in zip(terms.columns, combinations, strict=True)
        ]
        self._available = self.counts(np.flatnonzero(terms.held | terms.eligible))

    def counts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many of ``rows`` are in each cell."""
        n_cells = self._members[0].shape[1]
        return np.bincount(self.codes[rows], minlength=n_cells).astype(np.int64)

    def feasible(self, counts: NDArray[np.int64]) -> bool:
        """Whether rows can be added to these so that the terms are met."""
        for column, members in zip(self._columns, self._members, strict=True):
            by_label = members @ counts
            missing = np.maximum(column.floors - by_label, 0).sum()
            if (by_label > column.ceilings).any() or missing > self._size - counts.sum():
                return False
        # With one column the rest follows: `agree` has seen that there are enough rows of every label.
        return len(self._columns) == 1 or self._programme(counts)

    def _programme(self, counts: NDArray[np.int64]) -> bool:
        from scipy.optimize import Bounds, LinearConstraint, milp

        matrix = np.concatenate([*self._members, np.ones((1, len(counts)), dtype=bool)]).astype(np.float64)
        lower = np.concatenate([*(column.floors for column in self._columns), [self._size]])
        upper = np.concatenate([*(column.ceilings for column in self._columns), [self._size]])
        answer = milp(
            np.zeros(len(counts)),
            integrality=np.ones(len(counts)),
            bounds=Bounds(counts, self._available),
            constraints=LinearConstraint(matrix, lower, upper),
        )
        if answer.status not in {0, _MILP_INFEASIBLE}:
            raise RuntimeError(
                f"Got status {answer.status} from scipy.optimize.milp ({answer.message}) for {len(counts)} "
                "combinations of labels; expected an answer. Name fewer labels, or use fewer columns."
            )
        return bool(answer.status == 0)


def _combinations(columns: Sequence[Column]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The c combinations of codes that occur, (columns, c), and which of them each row has, (n,)."""
    combinations, codes = np.unique(
        np.stack([column.codes for column in columns]), axis=1, return_inverse=True
    )
    return combinations, codes.reshape(-1).astype(np.int64)


class Reserve:
    """The cheapest rows that the floors still need, while a budget of tokens is spent on others."""

    def __init__(self, terms: Terms, costs: NDArray[np.int64]) -> None:
        self._costs = costs
        self._reserved: dict[int, list[int]] = {}  # by label, cheapest first
        self._label_of: NDArray[np.int64] = np.full(terms.n, -1, dtype=np.int64)
        for column in terms.columns:
            if not column.floors.any():
                continue
            self._label_of = column.codes
            missing = np.maximum(column.floors - column.counts(terms.held), 0)
            rows = terms.eligible_rows
            rows = rows[np.argsort(costs[rows], kind="stable")]
            for label in np.flatnonzero(missing).tolist():
                self._reserved[label] = rows[column.codes[rows] == label][: missing[label]].tolist()
        self._members = {row for rows in self._reserved.values() for row in rows}
        self.cost = int(sum(costs[row] for row in self._members))

    def released_by(self, row: int) -> int:
        """Tokens that need no longer be reserved once ``row`` is taken."""
        if row in self._members:
            return int(self._costs[row])
        reserved = self._reserved.get(int(self._label_of[row]))
        return int(self._costs[reserved[-1]]) if reserved else 0

    def take(self, row: int) -> None:
        """Release what ``row`` replaces: itself, or the dearest reserved row of its label."""
        reserved = self._reserved.get(int(self._label_of[row]))
        if not reserved:
            return
        if row in self._members:
            reserved.remove(row)
        else:
            row = reserved.pop()
        self._members.discard(row)
