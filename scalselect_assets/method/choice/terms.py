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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.candidates import Candidates
from scalselect_assets.method.selection import budget_size

BudgetUnit = Literal["rows", "image_tokens", "text_tokens"]

_OTHERS = "(all others)"
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

    def spent(self, rows: NDArray[np.int64]) -> int:
        """What ``rows`` cost: tokens, or rows."""
        return len(rows) if self.costs is None else int(self.costs[rows].sum())

    def _take_rows(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        left = (self.size or 0) - self.n_held
        if not self.columns:
            return order[:left]
        cells = _Cells(self)
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
        reserve = _Reserve(self, costs)
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


class Tally:
    """What is still allowed while rows are taken one by one, quick to ask.

    With a budget of rows and quotas on at most one column, exactly the rows with which the terms can still be
    met. Otherwise each column is judged alone and no tokens are reserved for floors, so that more may be
    admitted than `Terms.take` keeps. A row that is not admitted never is again.
    """

    def __init__(self, terms: Terms) -> None:
        """Begin with the held rows."""
        self._terms = terms
        self._counts = [column.counts(terms.held) for column in terms.columns]
        self._costs = terms.costs if terms.costs is not None else np.ones(terms.n, dtype=np.int64)
        budget = terms.tokens if terms.size is None else terms.size
        self._left = (budget or 0) - int(self._costs[terms.held].sum())

    @property
    def is_full(self) -> bool:
        """Whether nothing can be spent any more; with tokens, rows without cost may still be admitted."""
        return self._left <= 0

    def admits(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of ``rows`` could be the next one, (m,) bool."""
        allowed = self._costs[rows] <= self._left
        for column, counts in zip(self._terms.columns, self._counts, strict=True):
            labels = counts < column.ceilings
            if self._terms.size is not None:
                missing = np.maximum(column.floors - counts, 0)
                labels &= (missing > 0) | (self._left > missing.sum())
            allowed &= labels[column.codes[rows]]
        return allowed

    def take(self, row: int) -> None:
        """Count ``row`` as chosen."""
        self._left -= int(self._costs[row])
        for column, counts in zip(self._terms.columns, self._counts, strict=True):
            counts[column.codes[row]] += 1


class _Cells:
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


class _Reserve:
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


def agree(
    candidates: Candidates,
    budget: Budget,
    quotas: Sequence[Quota] = (),
    *,
    include: NDArray[np.int64] | Sequence[int] = (),
    exclude: NDArray[np.int64] | Sequence[int] = (),
) -> Terms:
    """The terms in numbers, known to be feasible.

    Args:
        candidates: The pool.
        budget: Fractions are of all candidates, the excluded ones included.
        quotas: At most one for each column.
        include: Rows that must be chosen; they count towards budget and quotas.
        exclude: Rows that must not.

    Raises:
        InfeasibleError: No choice meets the terms.
        ValueError: The terms are not understood: a column or label that is not there (a floor of a label
            without rows is infeasible; a ceiling of one is met), a number out of range, a quota by shares
            or floors on several columns beside a budget of tokens.
    """
    held, excluded = _mask(candidates.n, include, "include"), _mask(candidates.n, exclude, "exclude")
    if both := np.flatnonzero(held & excluded).tolist():
        raise InfeasibleError(
            f"Got {len(both)} rows both to include and to exclude, the first of them row {both[0]} (counted "
            "from 0); a row can be only one. Take them from one of the lists."
        )
    eligible = ~held & ~excluded
    costs = _costs(candidates, budget.unit)
    size, tokens = None, None
    if costs is None:
        size = budget_size(budget.amount, candidates.n)
        _check_rows(size, held, eligible)
    else:
        tokens = _token_budget(budget, costs)
        _check_tokens(tokens, budget.unit, costs, held, eligible)
    names = [quota.column for quota in quotas]
    if len(set(names)) < len(names):
        raise ValueError(f"Got quotas on columns {names}; allowed is one for each. Join those of one column.")
    columns = tuple(_column(candidates, quota, size) for quota in quotas)
    terms = Terms(candidates.n, size, tokens, costs, held, eligible, columns)
    for column in columns:
        _check_column(terms, column)
    if costs is not None:
        _check_token_floors(terms, budget.unit, costs)
    elif len(columns) > 1:
        cells = _Cells(terms)
        if not cells.feasible(cells.counts(np.flatnonzero(held))):
            raise InfeasibleError(
                f"Got quotas on {', '.join(repr(column.name) for column in columns)} and a budget of {size} "
                "rows; each column alone can be met, all together cannot, by the labels that rows have in "
                "common. Lower floors or raise ceilings."
            )
    return terms


def proportional_sizes(
    weights: Sequence[float],
    size: int,
    floors: Sequence[int] | None = None,
    ceilings: Sequence[int] | None = None,
) -> list[int]:
    """Whole numbers in proportion to weights within bounds, by the method of largest remainders.

    Shares are t·weight, held within the bounds, with the t at which they sum to ``size``; they are rounded
    down, and the largest remainders up, the earlier one of equal remainders first. Exact: all in fractions.

    Args:
        weights: >= 0, c of them. Where all that are not at a bound are 0, they count as equal.
        size: Sum of the result.
        floors: At least these; 0 by default.
        ceilings: At most these; ``size`` by default.

    Raises:
        InfeasibleError: The floors sum to more than ``size``, the ceilings to less, or one floor is above its
            ceiling.
    """
    low = list(floors) if floors is not None else [0] * len(weights)
    high = [min(size, c) for c in ceilings] if ceilings is not None else [size] * len(weights)
    if any(a > b for a, b in zip(low, high, strict=True)) or not sum(low) <= size <= sum(high):
        raise InfeasibleError(
            f"Got floors {low} and ceilings {high} for {size} rows in proportion; the floors have to sum to "
            "at most that, the ceilings to at least. Change the quotas."
        )
    exact = [Fraction(weight) for weight in weights]
    shares: dict[int, Fraction] = {}
    while len(shares) < len(exact):
        free = [i for i in range(len(exact)) if i not in shares]
        left = size - sum(shares.values(), start=Fraction(0))
        total = sum((exact[i] for i in free), start=Fraction(0))
        wanted = {i: left * exact[i] / total if total else left / len(free) for i in free}
        held = {i: min(max(share, Fraction(low[i])), Fraction(high[i])) for i, share in wanted.items()}
        # All bounds that err to the side on which the sum errs stay; the others may come free again.
        excess = sum(held.values(), start=Fraction(0)) - left
        fixed = {
            i: share
            for i, share in held.items()
            if excess == 0 or (share > wanted[i] if excess > 0 else share < wanted[i])
        }
        shares |= fixed
    sizes = [math.floor(shares[i]) for i in range(len(exact))]
    by_remainder = sorted(range(len(exact)), key=lambda i: (sizes[i] - shares[i], i))
    for i in by_remainder[: size - sum(sizes)]:
        sizes[i] += 1
    return sizes


def _mask(n: int, rows: NDArray[np.int64] | Sequence[int], name: str) -> NDArray[np.bool_]:
    wanted = np.asarray(rows, dtype=np.int64)
    outside = wanted[(wanted < 0) | (wanted >= n)]
    if outside.size:
        raise ValueError(
            f"Got row {outside[0]} to {name}; allowed is 0 to {n - 1}. Name only rows that are in the pool."
        )
    mask = np.zeros(n, dtype=bool)
    mask[wanted] = True
    return mask


def _costs(candidates: Candidates, unit: str) -> NDArray[np.int64] | None:
    match unit:
        case "rows":
            return None
        case "image_tokens":
            return candidates.n_image_tokens
        case "text_tokens":
            return candidates.n_text_tokens
        case _:
            raise ValueError(
                f"Got a budget in {unit!r}; allowed are rows, image_tokens and text_tokens. Use one of them."
            )


def _token_budget(budget: Budget, costs: NDArray[np.int64]) -> int:
    total, unit = int(costs.sum()), budget.unit.replace("_", " ")
    if total == 0:
        raise InfeasibleError(
            f"Got a budget in {unit}, and no row has any; nothing would limit the choice. Use one of rows."
        )
    is_count = isinstance(budget.amount, int) and not isinstance(budget.amount, bool)
    if is_count and budget.amount > total:
        raise InfeasibleError(
            f"Got a budget of {budget.amount} {unit} with {total} in the pool; allowed is at most {total}. "
            "Lower the budget, write it as a fraction, or add shards."
        )
    return budget_size(budget.amount, total)


def _check_rows(size: int, held: NDArray[np.bool_], eligible: NDArray[np.bool_]) -> None:
    n_held, n_allowed = np.count_nonzero(held), np.count_nonzero(held | eligible)
    if n_held > size:
        raise InfeasibleError(
            f"Got {n_held} rows to include with a budget of {size} rows; allowed is at most {size}. Raise "
            "the budget or shorten the list."
        )
    if n_allowed < size:
        raise InfeasibleError(
            f"Got a budget of {size} rows with {n_allowed} left when {len(held) - n_allowed} of {len(held)} "
            f"are excluded; allowed is at most {n_allowed}. Lower the budget or exclude fewer."
        )


def _check_tokens(
    tokens: int, unit: str, costs: NDArray[np.int64], held: NDArray[np.bool_], eligible: NDArray[np.bool_]
) -> None:
    unit = unit.replace("_", " ")
    needed = int(costs[held].sum())
    if needed > tokens:
        raise InfeasibleError(
            f"Got {np.count_nonzero(held)} rows to include, of {needed} {unit} together, with a budget of "
            f"{tokens}; allowed is at most that. Raise the budget or shorten the list."
        )
    if not held.any() and (not eligible.any() or costs[eligible].min() > tokens):
        cheapest = f"the cheapest has {costs[eligible].min()}" if eligible.any() else "all are excluded"
        raise InfeasibleError(
            f"Got a budget of {tokens} {unit}, which no row fits: {cheapest}. Raise it or exclude fewer rows."
        )


def _column(candidates: Candidates, quota: Quota, size: int | None) -> Column:
    if quota.column not in candidates.labels:
        raise ValueError(
            f"Got a quota on {quota.column!r}; the candidates have labels of {sorted(candidates.labels)}. "
            "Name one of these columns."
        )
    labels = candidates.labels[quota.column]
    named = sorted({*quota.floors, *quota.ceilings})
    code_of = {value: code for code, value in enumerate(named)}
    codes = np.array([code_of.get(value, len(named)) for value in labels.values], dtype=np.int64)
    floors, ceilings = np.zeros(len(named) + 1, np.int64), np.full(len(named) + 1, candidates.n, np.int64)
    for value, bound in quota.floors.items():
        floors[code_of[value]] = math.ceil(_rows(quota.column, value, bound, size))
    for value, bound in quota.ceilings.items():
        ceilings[code_of[value]] = math.floor(_rows(quota.column, value, bound, size))
    return Column(quota.column, (*named, _OTHERS), codes[labels.codes], floors, ceilings)


def _rows(column: str, value: str, bound: int | float, size: int | None) -> Fraction:
    is_count = isinstance(bound, int) and not isinstance(bound, bool) and bound >= 0
    if is_count:
        return Fraction(bound)
    if not (isinstance(bound, float) and 0 <= bound <= 1):
        raise ValueError(
            f"Got {bound!r} as a quota of {value!r} in {column!r}; allowed is a number of rows from 0 (int), "
            "or a share of the budget from 0.0 to 1.0 (float). Write it in one of these forms."
        )
    if size is None:
        raise ValueError(
            f"Got the share {bound} as a quota of {value!r} in {column!r} beside a budget of tokens, where "
            "the number of rows is not known before; only numbers of rows are allowed. Write a whole number."
        )
    return Fraction(str(bound)) * size  # str() gives back the decimal that was written


def _check_column(terms: Terms, column: Column) -> None:
    allowed, held = column.counts(terms.held | terms.eligible), column.counts(terms.held)
    for label, value in enumerate(column.values):
        floor, ceiling = int(column.floors[label]), int(column.ceilings[label])
        if floor > ceiling:
            raise InfeasibleError(
                f"Got a floor of {floor} rows and a ceiling of {ceiling} for {value!r} in {column.name!r}; "
                "the floor has to be at most the ceiling. Change one of them."
            )
        if floor > allowed[label]:
            raise InfeasibleError(
                f"Got a floor of {floor} rows for {value!r} in {column.name!r}, which has {allowed[label]} "
                "that are not excluded; allowed is at most that. Lower the floor or exclude fewer."
            )
        if held[label] > ceiling:
            raise InfeasibleError(
                f"Got a ceiling of {ceiling} rows for {value!r} in {column.name!r}, and {held[label]} of "
                "them to include; allowed is at most the ceiling. Raise it or shorten the list."
            )
    if terms.size is None:
        return
    needed, room = int(np.maximum(column.floors, held).sum()), int(np.minimum(column.ceilings, allowed).sum())
    if needed > terms.size:
        also = ", with the rows to include," if (held > column.floors).any() else ""
        raise InfeasibleError(
            f"The floors of {column.name!r}{also} need {needed} rows, the budget has {terms.size}. Raise the "
            "budget or lower the floors."
        )
    if room < terms.size:
        raise InfeasibleError(
            f"The ceilings of {column.name!r} leave room for {room} rows, the budget has {terms.size}. Lower "
            "the budget or raise the ceilings."
        )


def _check_token_floors(terms: Terms, unit: str, costs: NDArray[np.int64]) -> None:
    with_floors = [column.name for column in terms.columns if column.floors.any()]
    if len(with_floors) > 1:
        raise ValueError(
            f"Got floors on {with_floors} beside a budget of tokens; allowed is one column with floors. Use "
            "a budget of rows, or label the rows with a column that joins these."
        )
    # The cheapest rows of a label are those that its floor can be met with for the fewest tokens. With
    # ceilings on another column beside it, they may not all be allowed.
    if with_floors and len(terms.columns) > 1:
        raise ValueError(
            f"Got floors on {with_floors[0]!r} and ceilings on other columns beside a budget of tokens; "
            "allowed are quotas on one column where there are floors. Use one of rows, or join the columns."
        )
    needed = int(costs[terms.held].sum()) + _Reserve(terms, costs).cost
    if terms.tokens is not None and needed > terms.tokens:
        raise InfeasibleError(
            f"The floors of {with_floors[0]!r} and the rows to include need at least {needed} "
            f"{unit.replace('_', ' ')}, the budget has {terms.tokens}. Raise the budget or lower the floors."
        )
