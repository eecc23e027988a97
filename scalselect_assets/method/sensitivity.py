"""How much the choice depends on the rank: the same rows chosen with fewer or more directions.

The energy threshold is the method's one free choice, so whoever looks at a basis should see what another one
would have done.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.moments import matrix_width
from scalselect_assets.method.subspace import Subspace


@dataclass(frozen=True, slots=True)
class RankAlternative:
    """What another rank would choose.

    Attributes:
        rule: How the rank was found.
        k: The rank.
        energy: Share of the energy that it holds.
        overlap: Share of the rows chosen with the present rank that would be chosen with this one, too.
    """

    rule: str
    k: int
    energy: float
    overlap: float


def rank_alternatives(
    x: NDArray[Any], axes: Subspace, k: int, ranks: Mapping[str, int], fraction: float
) -> list[RankAlternative]:
    """Choose the same share of some rows with other ranks, in O(m·d·max k) time.

    Args:
        x: (m, d) rows of the pool, all or a sample; with a sample the overlaps are estimates.
        axes: The pool's subspace with at least as many directions as any of the ranks.
        k: The rank in force.
        ranks: Other ranks, by the rule that gives them.
        fraction: Share of the rows that the budget buys, in (0, 1].

    Raises:
        ValueError: ``x`` is not a matrix of the subspace's width, or has no rows.
    """
    matrix_width(x, expected=axes.d)
    if len(x) == 0:
        raise ValueError("Got 0 rows; comparing choices needs at least 1. Embed a shard first.")
    size = max(1, round(fraction * len(x)))
    squares = np.square((np.asarray(x, dtype=np.float64) - axes.mean) @ axes.whitening)
    leverage = np.cumsum(squares, axis=1)
    curve = axes.energy_curve()

    def chosen(rank: int) -> set[int]:
        if rank == 0:
            return set(range(size))
        return set(np.argsort(-leverage[:, rank - 1], kind="stable")[:size].tolist())

    present = chosen(k)
    return [
        RankAlternative(
            rule, rank, float(curve[rank - 1]) if rank else 0.0, len(present & chosen(rank)) / size
        )
        for rule, rank in ranks.items()
    ]
