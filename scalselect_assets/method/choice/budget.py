"""The budget of the choice: how many rows; the rows of largest leverage are then taken by the asset."""

import math
import re
from decimal import Decimal
from fractions import Fraction

_COUNT = re.compile(r"[0-9]+(_[0-9]+)*")
_FRACTION = re.compile(r"[0-9]+\.[0-9]*|\.[0-9]+")
_PERCENT = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+) ?%")

_ALLOWED = (
    "allowed is a whole number of rows from 1 (100000), or a fraction of the embedded rows above 0 and at "
    "most 1 (0.16 or 1.0; as text also 16%)"
)


def parse_budget(text: str) -> int | float:
    """The budget that a person wrote: a count (int) or a fraction (float).

    ``100000`` and ``100_000`` are counts, ``0.16`` and ``16%`` the same fraction. The point decides: ``1`` is
    one row, ``1.0`` is every row.

    Raises:
        ValueError: The text is none of these, or its value is out of range.
    """
    written = text.strip()
    budget: int | float
    if _COUNT.fullmatch(written):
        budget = int(written)
    elif _FRACTION.fullmatch(written):
        budget = float(written)
    elif percent := _PERCENT.fullmatch(written):
        budget = float(Decimal(percent[1]) / 100)
    else:
        raise ValueError(f"Got budget {text!r}; {_ALLOWED}. Write it in one of these forms.")
    _check_budget(budget, text)
    return budget


def budget_size(budget: int | float, n_embedded: int) -> int:
    """The number of rows that a budget buys.

    An int is that many rows. A float is a fraction of the embedded rows, as it is written in decimal, rounded
    half up (0.145 of 100 is 15) and at least 1.

    Args:
        budget: A count from 1 to ``n_embedded``, or a fraction in (0, 1].
        n_embedded: Number of rows to choose from.

    Raises:
        ValueError: The budget is out of range or neither int nor float, a count exceeds ``n_embedded``, or
            there are no rows.
    """
    _check_budget(budget, budget)
    if n_embedded < 1:
        raise ValueError(
            f"Got {n_embedded} embedded rows; a budget needs at least 1. Embed a shard, or look at why every "
            "row was rejected."
        )
    if isinstance(budget, int):
        if budget > n_embedded:
            raise ValueError(
                f"Got a budget of {budget} rows with {n_embedded} embedded; allowed is at most {n_embedded}. "
                "Lower the budget, write it as a fraction, or add shards."
            )
        return budget
    # str() gives back the decimal that was written: 0.145 is meant, not the binary number just below it.
    return max(1, math.floor(Fraction(str(budget)) * n_embedded + Fraction(1, 2)))


def _check_budget(budget: int | float, written: object) -> None:
    """Raise unless ``budget`` is an int from 1 or a float in (0, 1]; bool is neither."""
    is_count = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
    is_fraction = isinstance(budget, float) and 0 < budget <= 1
    if not (is_count or is_fraction):
        raise ValueError(f"Got budget {written!r}; {_ALLOWED}. Write it in one of these forms.")
