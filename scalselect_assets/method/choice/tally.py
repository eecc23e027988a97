"""Counting rows and tokens by label."""

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.choice.terms import Terms


class Tally:
    """The rows that the terms still allow while rows are taken one by one; fast to query.

    With a budget of rows and quotas on at most one column, it admits exactly the rows with which the terms
    can still be met. Otherwise it judges each column alone and reserves no tokens for floors, so it may admit
    more rows than `taking.take` keeps. Once refused, a row stays refused.
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
        """Mark those of ``rows`` that could be taken next, (m,) bool."""
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
