"""Checking that budget and quotas can be met together."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.choice.budget import budget_size
from scalselect_assets.method.choice.candidates import Candidates
from scalselect_assets.method.choice.taking import LabelCells, Reserve
from scalselect_assets.method.choice.terms import (
    Budget,
    InfeasibleError,
    LabelColumn,
    Quota,
    Terms,
)

_OTHERS = "(all others)"


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
        budget: The budget. A fraction refers to all candidates, the excluded ones included.
        quotas: The quotas, at most one for each column.
        include: Rows that must be chosen; they count towards budget and quotas.
        exclude: Rows that must not be chosen.

    Raises:
        InfeasibleError: No choice meets the terms.
        ValueError: The terms are invalid: a column or label does not exist (a floor of a label without rows
            is infeasible; a ceiling of one is met), a number is out of range, or a budget of tokens is
            combined with a quota by shares or with floors on several columns.
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
        cells = LabelCells(terms)
        if not cells.feasible(cells.counts(np.flatnonzero(held))):
            raise InfeasibleError(
                f"Got quotas on {', '.join(repr(column.name) for column in columns)} and a budget of {size} "
                "rows; each column alone can be met, all together cannot, by the labels that rows have in "
                "common. Lower floors or raise ceilings."
            )
    return terms


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


def _column(candidates: Candidates, quota: Quota, size: int | None) -> LabelColumn:
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
    return LabelColumn(quota.column, (*named, _OTHERS), codes[labels.codes], floors, ceilings)


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


def _check_column(terms: Terms, column: LabelColumn) -> None:
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
    # The cheapest rows of a label meet its floor for the fewest tokens. Ceilings on another column may
    # forbid some of them.
    if with_floors and len(terms.columns) > 1:
        raise ValueError(
            f"Got floors on {with_floors[0]!r} and ceilings on other columns beside a budget of tokens; "
            "allowed are quotas on one column where there are floors. Use one of rows, or join the columns."
        )
    needed = int(costs[terms.held].sum()) + Reserve(terms, costs).cost
    if terms.tokens is not None and needed > terms.tokens:
        raise InfeasibleError(
            f"The floors of {with_floors[0]!r} and the rows to include need at least {needed} "
            f"{unit.replace('_', ' ')}, the budget has {terms.tokens}. Raise the budget or lower the floors."
        )
