"""One night's choice: a strategy's order of preference, what is kept of an earlier choice, and the terms."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.choice.candidates import Blocks, Candidates
from scalselect_assets.method.choice.strategies import Ranking, Strategy
from scalselect_assets.method.choice.taking import take, with_at_most
from scalselect_assets.method.choice.terms import Terms


@dataclass(frozen=True, slots=True)
class KeepEarlier:
    """Bounds on how far a choice moves from an earlier one of the same pool.

    Attributes:
        slack: In [0, 1]: an earlier row stays while its score is at least (1 - slack) times the lowest score
            of the choice that would be made without it. At 0 it stays only where it would be chosen anyway,
            or is level with the last.
        max_churn: In [0, 1], or None for no bound: at most this share of the chosen rows, rounded down, is
            new, as far as the terms allow; the earlier rows of highest score stay. With a budget of tokens
            earlier rows come first until the share is reached, as far as there are any.

    Raises:
        ValueError: A number is outside its range.
    """

    slack: float = 0.0
    max_churn: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("slack", self.slack), ("max_churn", self.max_churn)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"Got {name} {value}; allowed is 0 to 1. It is a share, such as 0.1.")


@dataclass(frozen=True, slots=True, eq=False)
class KeepCost:
    """The changes and the cost of keeping earlier rows, compared with the choice made without it.

    Attributes:
        rows: (n_kept,) int64, earlier rows chosen only because they are earlier ones, ascending.
        churn_without: Share of the rows chosen without keeping that are not earlier ones.
        leverage_lost: Share that is lost of the normalised leverage chosen without keeping; negative where
            keeping has gained, as it can with strategies that do not rank by leverage.
    """

    rows: NDArray[np.int64]
    churn_without: float
    leverage_lost: float

    @property
    def n_kept(self) -> int:
        """Number of rows chosen only because they are earlier ones."""
        return len(self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The rows chosen, N of them.

    Attributes:
        rows: (N,) int64: the rows to include, ascending, then the others, most preferred first.
        n_held: Number of rows that had to be chosen.
        spent: Rows or tokens, in the unit of the budget.
        recorded: Values that the strategy records for each chosen row, by name, (N,) float64 each.
        figures: Figures that it records for the choice as a whole, by name.
        kept: The cost of keeping earlier rows; None if this was not asked for.
    """

    rows: NDArray[np.int64]
    n_held: int
    spent: int
    recorded: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    kept: KeepCost | None = None


def choose(
    candidates: Candidates,
    strategy: Strategy,
    terms: Terms,
    projections: Blocks | None = None,
    *,
    earlier: NDArray[np.int64] | Sequence[int] | None = None,
    keep: KeepEarlier | None = None,
) -> Choice:
    """Choose by a strategy under terms.

    Args:
        candidates: The pool.
        strategy: The strategy that ranks the rows.
        terms: The terms, made from the same candidates (`quotas.agree`).
        projections: The rows of U_k, for strategies that need them.
        earlier: Rows of the earlier choice that are still in the pool; used with ``keep`` only.
        keep: Bounds within which earlier rows are preferred; None gives them no advantage.

    Raises:
        ValueError: The strategy lacks an input that it needs; or earlier rows are to be kept by a strategy
            that draws; or earlier rows are not in the pool.
    """
    ranking = strategy.rank(candidates, terms, projections)
    rows = take(terms, ranking.order)
    kept = None
    if keep is not None:
        without = rows
        was_chosen = _was_chosen(candidates.n, earlier)
        rows = _kept_choice(ranking, terms, without, was_chosen, keep)
        kept = _cost(candidates, was_chosen, rows, without)
    return Choice(
        rows,
        terms.n_held,
        terms.spent(rows),
        {name: values[rows] for name, values in ranking.recorded.items()},
        ranking.figures,
        kept,
    )


def _kept_choice(
    ranking: Ranking,
    terms: Terms,
    without: NDArray[np.int64],
    was_chosen: NDArray[np.bool_],
    keep: KeepEarlier,
) -> NDArray[np.int64]:
    """The choice in which earlier rows stay, within the terms."""
    score, order = ranking.score, ranking.order
    if score is None:
        raise ValueError(
            "Got earlier rows to keep with a strategy that draws at random; its rows have no scores that a "
            "threshold could be compared with, and its inclusion probabilities would be wrong. Keep none, or "
            "choose by top_leverage, coverage, spanning or length."
        )
    free = without[terms.n_held :]
    threshold = float(score[free].min()) if free.size else math.inf
    earlier = order[was_chosen[order]]
    stays = np.zeros(terms.n, dtype=bool)
    stays[earlier] = score[earlier] >= (1 - keep.slack) * threshold
    rows = take(terms, _in_front(order, stays))
    if keep.max_churn is None or (excess := _excess(rows, was_chosen, keep.max_churn)) <= 0:
        return rows
    if terms.size is not None:
        n_new = int(np.count_nonzero(~was_chosen[rows])) - excess
        return take(with_at_most(terms, n_new, ~was_chosen), _in_front(order, stays))
    # Earlier rows that are chosen anyway count as kept; the best of the others follow until there are enough.
    stays[rows] = was_chosen[rows]
    others = earlier[~stays[earlier]]
    while excess > 0 and others.size:
        stays[others[:excess]] = True
        others = others[excess:]
        rows = take(terms, _in_front(order, stays))
        excess = _excess(rows, was_chosen, keep.max_churn)
    return rows


def _in_front(order: NDArray[np.int64], marked: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.concatenate([order[marked[order]], order[~marked[order]]])


def _excess(rows: NDArray[np.int64], was_chosen: NDArray[np.bool_], max_churn: float) -> int:
    """The number of new rows beyond those that the churn allows."""
    allowed = math.floor(Fraction(str(max_churn)) * len(rows))
    return int(np.count_nonzero(~was_chosen[rows])) - allowed


def _cost(
    candidates: Candidates,
    was_chosen: NDArray[np.bool_],
    rows: NDArray[np.int64],
    without: NDArray[np.int64],
) -> KeepCost:
    leverage = float(candidates.normalised_leverage[rows].sum())
    leverage_without = float(candidates.normalised_leverage[without].sum())
    only_kept = np.setdiff1d(rows[was_chosen[rows]], without)
    return KeepCost(
        rows=only_kept,
        churn_without=float(np.mean(~was_chosen[without])),
        leverage_lost=1 - leverage / leverage_without if leverage_without else 0.0,
    )


def _was_chosen(n: int, earlier: NDArray[np.int64] | Sequence[int] | None) -> NDArray[np.bool_]:
    rows = np.asarray(() if earlier is None else earlier, dtype=np.int64)
    outside = rows[(rows < 0) | (rows >= n)]
    if outside.size:
        raise ValueError(
            f"Got the earlier row {outside[0]}; allowed is 0 to {n - 1}. Name only rows that are still in "
            "the pool."
        )
    mask = np.zeros(n, dtype=bool)
    mask[rows] = True
    return mask
