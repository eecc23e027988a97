"""The sensitivity of the choice to the rank: the share of rows chosen alike with fewer or more directions.

The energy threshold is the method's only free parameter, so a person who looks at a basis should see the
effect of another one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.subspace.basis import Subspace
from scalselect_assets.method.subspace.moments import matrix_width

_BLOCK_ROWS = 1024


@dataclass(frozen=True, slots=True)
class RankAlternative:
    """The choice that another rank would make.

    Attributes:
        rule: The rule that gave the rank.
        k: The rank.
        overlap: Share of the rows chosen with the present rank that would be chosen with this one, too.
    """

    rule: str
    k: int
    overlap: float


def rank_alternatives(
    x: NDArray[Any], axes: Subspace, k: int, ranks: Mapping[str, int], size: int
) -> list[RankAlternative]:
    """Choose the same number of rows with other ranks, in O(m·d·max k) time and O(m) memory per rank.

    Args:
        x: (m, d) rows of the pool, all or a sample; with a sample the overlaps are estimates.
        axes: The pool's subspace with at least as many directions as any of the ranks.
        k: The rank in force.
        ranks: Other ranks, by the rule that gives them.
        size: Number of rows to choose, 1 to m.

    Raises:
        ValueError: ``x`` is not a matrix of the subspace's width, or has fewer than ``size`` rows.
    """
    matrix_width(x, expected=axes.d)
    if not 1 <= size <= len(x):
        raise ValueError(f"Got {size} of {len(x)} rows to choose; allowed is 1 up to all of them. Pass more.")
    wanted = sorted({k, *ranks.values()})
    whitening = axes.whitening
    leverage = {rank: np.empty(len(x)) for rank in wanted}
    for start in range(0, len(x), _BLOCK_ROWS):
        rows = np.asarray(x[start : start + _BLOCK_ROWS], dtype=np.float64) - axes.mean
        held = np.cumsum(np.square(rows @ whitening[:, : wanted[-1]]), axis=1)
        for rank in wanted:
            leverage[rank][start : start + len(rows)] = held[:, rank - 1] if rank else 0.0
    chosen = {
        rank: set(np.argsort(-scores, kind="stable")[:size].tolist()) for rank, scores in leverage.items()
    }
    return [RankAlternative(rule, rank, len(chosen[k] & chosen[rank]) / size) for rule, rank in ranks.items()]
