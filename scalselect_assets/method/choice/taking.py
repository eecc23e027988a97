"""The first choice in an order of preference that meets the terms."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.choice.terms import LabelColumn, Terms, combinations_of

_MILP_INFEASIBLE = 2  # scipy.optimize.milp's status


def take(terms: Terms, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first choice in an order of preference that meets the terms.

    Costs O(n log n) with a budget of rows and quotas on up to one column. With quotas on several, an
    integer programme over the combinations of named labels is solved some twenty times for each of them.

    Args:
        terms: The terms, which `agree` knows to be feasible.
        order: Every eligible row once, most preferred first; int64.

    Returns:
        The held rows, ascending, then the rows taken, in order; int64.

    Raises:
        ValueError: ``order`` is not an order of the eligible rows.
    """
    if len(order) != np.count_nonzero(terms.eligible) or not np.array_equal(
        np.sort(order), terms.eligible_rows
    ):
        raise ValueError(
            f"Got an order of {len(order)} rows; expected each of the "
            f"{np.count_nonzero(terms.eligible)} eligible rows once. Rank all of them."
        )
    taken = _take_rows(terms, order) if terms.size is not None else _take_tokens(terms, order)
    return np.concatenate([np.flatnonzero(terms.held), taken])


def with_at_most(terms: Terms, limit: int, marked: NDArray[np.bool_]) -> Terms:
    """The same terms and one more: at most ``limit`` of some rows, or as few more as can be.

    For budgets of rows. Where there are quotas, it costs one integer programme, and one more for each
    doubling of the budget where the limit is too low.

    Args:
        terms: The terms to narrow.
        limit: Largest number of the rows that is wanted.
        marked: (n,) bool, the rows.
    """
    size, allowed = terms.size or 0, terms.held | terms.eligible
    low = max(
        limit,
        int(np.count_nonzero(marked & terms.held)),
        size - int(np.count_nonzero(~marked & allowed)),
    )
    free = np.array([terms.n, 0], dtype=np.int64)

    def bounded(most: int) -> Terms:
        ceilings = free + np.array([0, most], dtype=np.int64)
        column = LabelColumn(
            "(marked)", ("(others)", "(marked)"), marked.astype(np.int64), 0 * free, ceilings
        )
        return replace(terms, columns=(*terms.columns, column))

    def can_be_met(narrowed: Terms) -> bool:
        cells = LabelCells(narrowed)
        return cells.feasible(cells.counts(np.flatnonzero(narrowed.held)))

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


def _take_rows(terms: Terms, order: NDArray[np.int64]) -> NDArray[np.int64]:
    left = (terms.size or 0) - terms.n_held
    if not terms.columns:
        return order[:left]
    cells = LabelCells(terms)
    counts = cells.counts(np.flatnonzero(terms.held))
    taken: list[NDArray[np.int64]] = []
    while left:
        # Once a row of a cell cannot be taken, no later row of that cell can be: rows taken in between only
        # reduce the choice. So each round closes a cell, or is the last one.
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


def _take_tokens(terms: Terms, order: NDArray[np.int64]) -> NDArray[np.int64]:
    tokens, costs = terms.tokens_and_costs()
    left = tokens - int(costs[terms.held].sum())
    counts = [column.counts(terms.held) for column in terms.columns]
    reserve = Reserve(terms, costs)
    left -= reserve.cost
    taken = []
    for row in order.tolist():
        labels = [int(column.codes[row]) for column in terms.columns]
        if any(
            count[label] >= column.ceilings[label]
            for column, count, label in zip(terms.columns, counts, labels, strict=True)
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


class LabelCells:
    """The combinations of labels that occur, and whether numbers of rows in them can grow into a choice."""

    def __init__(self, terms: Terms) -> None:
        self._size = terms.size or 0
        self._columns = terms.columns
        combinations, self.codes = combinations_of(terms.columns)
        # (labels, cells) by column: the cells that belong to each label.
        self._members = [
            np.arange(len(column.values))[:, None] == combination
            for column, combination in zip(terms.columns, combinations, strict=True)
        ]
        self._available = self.counts(np.flatnonzero(terms.held | terms.eligible))

    def counts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of ``rows`` in each cell."""
        n_cells = self._members[0].shape[1]
        return np.bincount(self.codes[rows], minlength=n_cells).astype(np.int64)

    def feasible(self, counts: NDArray[np.int64]) -> bool:
        """Whether rows can be added to these so that the terms are met."""
        for column, members in zip(self._columns, self._members, strict=True):
            by_label = members @ counts
            missing = np.maximum(column.floors - by_label, 0).sum()
            if (by_label > column.ceilings).any() or missing > self._size - counts.sum():
                return False
        # With one column the rest follows: `agree` has checked that every label has enough rows.
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
        """Release the reserved row that ``row`` replaces: itself, or the dearest one of its label."""
        reserved = self._reserved.get(int(self._label_of[row]))
        if not reserved:
            return
        if row in self._members:
            reserved.remove(row)
        else:
            row = reserved.pop()
        self._members.discard(row)
