"""Splitting a number into whole parts in proportion."""

import math
from collections.abc import Sequence
from fractions import Fraction

from scalselect_assets.method.choice.terms import InfeasibleError


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
        weights: c weights, >= 0. If all weights that are not at a bound are 0, they count as equal.
        size: Sum of the result.
        floors: Lower bounds; 0 by default.
        ceilings: Upper bounds; ``size`` by default.

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
        # Keep the bounds that move the sum in the direction of its error; the others may become free again.
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
