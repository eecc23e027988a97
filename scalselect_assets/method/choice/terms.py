"""The terms of a choice, and the first choice in an order of preference that keeps to them.

Terms are a budget in rows or tokens, floors and ceilings by label, and rows that must or must not be chosen.

The guarantees depend on the terms. `Terms.take` goes through the rows from the most preferred on and takes
each one with which the terms can still be met, so it gives the lexicographically first admissible choice.

- A budget in rows with quotas on at most one column: the admissible sets are those of a matroid, so the
  choice also has the largest total score of all admissible ones, whatever scores the order sorts by.
- A budget in rows with quotas on several columns: whether the terms can still be met is decided exactly (an
  integer programme over the combinations of labels), the total score is greedy's, not always the largest.
- A budget in tokens: rows that no longer fit are passed over and cheaper ones taken after them. Greedy: the
  largest total score would be a knapsack problem.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

BudgetUnit = Literal["rows", "image_tokens", "text_tokens"]


class InfeasibleError(ValueError):
    """No choice meets the terms; the message says which numbers contradict each other."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The largest amount that a choice may spend.

    Attributes:
        amount: A count (int), or a fraction in (0, 1] of all rows' total (float).
        unit: The unit of the amount. A budget of rows is spent exactly; one of tokens is not exceeded.
    """

    amount: int | float
    unit: BudgetUnit = "rows"


@dataclass(frozen=True, slots=True)
class Quota:
    """The smallest and largest number of chosen rows of each label; labels that are not named are free.

    Attributes:
        column: Name of the column of labels.
        floors: By label: rows (int), or a share in [0, 1] of a budget of rows (float), rounded up.
        ceilings: By label: rows (int), or a share in [0, 1] of a budget of rows (float), rounded down.
    """

    column: str
    floors: Mapping[str, int | float] = field(default_factory=dict)
    ceilings: Mapping[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class LabelColumn:
    """A quota in numbers; all labels that it does not name count as one label.

    Attributes:
        name: Name of the column.
        values: The labels, c of them.
        codes: (n,) int64, positions in ``values``.
        floors: (c,) int64, rows; 0 for a label without a floor.
        ceilings: (c,) int64, rows; n for a label without a ceiling.
    """

    name: str
    values: tuple[str, ...]
    codes: NDArray[np.int64]
    floors: NDArray[np.int64]
    ceilings: NDArray[np.int64]

    def counts(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> NDArray[np.int64]:
        """The number of ``rows`` that have each label, (c,) int64."""
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
    columns: tuple[LabelColumn, ...]

    @property
    def eligible_rows(self) -> NDArray[np.int64]:
        """The rows that may be chosen or not, ascending."""
        return np.flatnonzero(self.eligible)

    @property
    def n_held(self) -> int:
        """Number of rows that must be chosen."""
        return int(np.count_nonzero(self.held))

    @property
    def expected_size(self) -> int:
        """``size``, or the number of rows of average cost that the tokens buy; at least 1, at most n."""
        if self.size is not None:
            return self.size
        tokens, costs = self.tokens_and_costs()
        allowed = self.held | self.eligible
        bought = tokens * int(np.count_nonzero(allowed)) // max(1, int(costs[allowed].sum()))
        return max(1, self.n_held, min(int(np.count_nonzero(allowed)), bought))

    @property
    def cells(self) -> NDArray[np.int64]:
        """The combination of labels that each row has, as a number, (n,) int64; rows of one count alike."""
        if not self.columns:
            return np.zeros(self.n, dtype=np.int64)
        return combinations_of(self.columns)[1]

    def spent(self, rows: NDArray[np.int64]) -> int:
        """The cost of ``rows``, in the unit of the budget: tokens or rows."""
        return len(rows) if self.costs is None else int(self.costs[rows].sum())

    def tokens_and_costs(self) -> tuple[int, NDArray[np.int64]]:
        """The budget of tokens and the tokens of each row, (n,) int64.

        Raises:
            ValueError: The budget is one of rows.
        """
        if self.tokens is None or self.costs is None:
            raise ValueError("Got a budget of rows; only one of tokens has costs. Ask for its size.")
        return self.tokens, self.costs


def combinations_of(columns: Sequence[LabelColumn]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The c combinations of codes that occur, (columns, c), and which of them each row has, (n,)."""
    combinations, codes = np.unique(
        np.stack([column.codes for column in columns]), axis=1, return_inverse=True
    )
    return combinations, codes.reshape(-1).astype(np.int64)
