"""Orders of preference over a pool: the paper's top leverage, and the strategies it is compared with.

A strategy ranks every row that may be chosen; `taking.take` then goes down that order. The strategies
know the terms, so that what they compute for a given number of rows (inclusion probabilities, sizes by label,
rows that span together) is computed for the rows that will be chosen.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scalselect_assets.method.choice.candidates import Blocks, Candidates
from scalselect_assets.method.choice.coverage import coverage_order
from scalselect_assets.method.choice.proportions import proportional_sizes
from scalselect_assets.method.choice.spanning import DEFAULT_PASSES, DEFAULT_PRIOR, spanning_order
from scalselect_assets.method.choice.terms import InfeasibleError, LabelColumn, Terms


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """An order of preference.

    Attributes:
        order: Every eligible row once, most preferred first; int64.
        score: (n,) float64, what the order sorts by, so that scores of one night can be compared with a
            threshold; None where the order is drawn, and a score means nothing.
        recorded: Recorded values of each row, by name, (n,) float64 each.
        figures: Figures of the ranking as a whole, by name.
    """

    order: NDArray[np.int64]
    score: NDArray[np.float64] | None
    recorded: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)


class Strategy(Protocol):
    """Ranks the rows of a pool under given terms."""

    @property
    def needs_projections(self) -> bool:
        """Whether ``rank`` reads the projections."""
        ...

    def rank(self, candidates: Candidates, terms: Terms, projections: Blocks | None = None) -> Ranking:
        """The rows in order of preference.

        Args:
            candidates: The pool.
            terms: The terms of the choice, made from the same candidates.
            projections: The rows of U_k in the order of the candidates, for strategies that need them.

        Raises:
            ValueError: The strategy needs something that is not given.
        """
        ...

    def describe(self) -> dict[str, str | float | int]:
        """The name and the settings that identify the strategy, for display and for hashing."""
        ...


@dataclass(frozen=True, slots=True)
class TopLeverage:
    """The rows of largest leverage, as the paper chooses (arXiv 2602.11636); O(n log n)."""

    needs_projections = False

    def rank(self, candidates: Candidates, terms: Terms, projections: Blocks | None = None) -> Ranking:  # noqa: ARG002
        """See ``Strategy.rank``."""
        score = candidates.normalised_leverage
        return Ranking(candidates.by(score, terms.eligible_rows), score)

    def describe(self) -> dict[str, str | float | int]:
        """See ``Strategy.describe``."""
        return {"strategy": "top_leverage"}


@dataclass(frozen=True, slots=True)
class LongestText:
    """The rows with the most text tokens, a comparator; O(n log n)."""

    needs_projections = False

    def rank(self, candidates: Candidates, terms: Terms, projections: Blocks | None = None) -> Ranking:  # noqa: ARG002
        """See ``Strategy.rank``."""
        score = candidates.n_text_tokens.astype(np.float64)
        return Ranking(candidates.by(score, terms.eligible_rows), score)

    def describe(self) -> dict[str, str | float | int]:
        """See ``Strategy.describe``."""
        return {"strategy": "length"}


@dataclass(frozen=True, slots=True)
class Random:
    """Rows drawn with equal probability, without replacement, a comparator; O(n log n).

    Attributes:
        seed: >= 0. With the set of rows and their tie order it fixes the draw; the order in which the rows
            are given does not matter. Adding or removing a row changes the draw.
    """

    seed: int = 0
    needs_projections = False

    def rank(self, candidates: Candidates, terms: Terms, projections: Blocks | None = None) -> Ranking:  # noqa: ARG002
        """See ``Strategy.rank``."""
        order = _shuffled(candidates, np.random.default_rng(self.seed))
        return Ranking(order[terms.eligible[order]], None)

    def describe(self) -> dict[str, str | float | int]:
        """See ``Strategy.describe``."""
        return {"strategy": "random", "seed": self.seed}


@dataclass(frozen=True, slots=True)
class StratifiedRandom:
    """Rows drawn at random within each label, as many as its share of the pool, a comparator; O(n log n).

    With a budget of rows the numbers are those of `proportional_sizes` over all rows that are not excluded,
    held within the number of rows to include and the number there is, and within a quota on the same column.
    The drawn rows come first. With a budget of tokens, labels alternate, so that every beginning of the order
    is nearly proportional.

    Attributes:
        column: Labels to stratify by.
        seed: See ``Random``.
    """

    column: str
    seed: int = 0
    needs_projections = False

    def rank(self, candidates: Candidates, terms: Terms, projections: Blocks | None = None) -> Ranking:  # noqa: ARG002
        """See ``Strategy.rank``."""
        if self.column not in candidates.labels:
            raise ValueError(
                f"Got {self.column!r} to stratify by; the candidates have labels of "
                f"{sorted(candidates.labels)}. Name one of these columns."
            )
        labels = candidates.labels[self.column]
        order = _shuffled(candidates, np.random.default_rng(self.seed))
        order = order[terms.eligible[order]]
        n_labels = len(labels.values)
        n_of = np.bincount(labels.codes[order], minlength=n_labels)
        place = _place_within(labels.codes[order])
        # As if each label's rows were spread evenly over the order.
        spread = (place + 0.5) / n_of[labels.codes[order]]
        if terms.size is None:
            return Ranking(order[np.lexsort((labels.codes[order], spread))], None)
        n_held = np.bincount(labels.codes[terms.held], minlength=n_labels)
        sizes = self._sizes(candidates, terms, n_held, n_of + n_held)
        drawn = place < (sizes - n_held)[labels.codes[order]]
        return Ranking(order[np.lexsort((labels.codes[order], spread, ~drawn))], None)

    def _sizes(
        self, candidates: Candidates, terms: Terms, n_held: NDArray[np.int64], n_allowed: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        floors, ceilings = n_held.copy(), n_allowed.copy()
        values = candidates.labels[self.column].values
        for column in terms.columns:
            if column.name == self.column:
                for code, value in enumerate(values):
                    if value in column.values[:-1]:
                        bound = column.values.index(value)
                        floors[code] = max(floors[code], column.floors[bound])
                        ceilings[code] = min(ceilings[code], column.ceilings[bound])
        return np.array(
            proportional_sizes(n_allowed.tolist(), terms.size or 0, floors.tolist(), ceilings.tolist())
        )

    def describe(self) -> dict[str, str | float | int]:
        """See ``Strategy.describe``."""
        return {"strategy": "stratified_random", "column": self.column, "seed": self.seed}


@dataclass(frozen=True, slots=True)
class LeverageSampling:
    """Rows drawn with probability in proportion to leverage, without replacement; O(n log n).

    With a budget of rows, without quotas or with quotas on one column: systematic sampling of rows in random
    order (Madow 1949, "On the theory of systematic sampling, II"; Hartley & Rao 1962, "Sampling with unequal
    probabilities and without replacement"). The number of rows is fixed and the inclusion probabilities are
    exactly min(1, t·leverage), with the t at which they sum to the number; recorded as
    ``inclusion_probability``, 1 for held rows, 0 for excluded ones. A quota on a column divides the pool into
    the labels that it names and all others; how many rows each gives is fixed before the draw, in proportion
    to the probabilities without the quota (`proportional_sizes`).

    With quotas on several columns or a budget of tokens, such probabilities cannot be computed. Rows
    then come in the order of draws one by one, each in proportion to leverage among those that are left
    (Efraimidis & Spirakis 2006, "Weighted random sampling with a reservoir"), and the recorded
    ``inclusion_probability`` is NaN except where it is 1 or 0 for certain.

    Attributes:
        seed: See ``Random``.
    """

    seed: int = 0
    needs_projections = False

    def rank(self, candidates: Candidates, terms: Terms, projections: Blocks | None = None) -> Ranking:  # noqa: ARG002
        """See ``Strategy.rank``."""
        generator = np.random.default_rng(self.seed)
        shuffled = _shuffled(candidates, generator)
        shuffled = shuffled[terms.eligible[shuffled]]
        probability = np.where(terms.held, 1.0, 0.0)
        if terms.size is None or len(terms.columns) > 1:
            probability[terms.eligible] = np.nan
            return Ranking(
                self._one_by_one(candidates, shuffled, generator),
                None,
                {"inclusion_probability": probability},
            )
        leverage = candidates.normalised_leverage
        order = []
        for rows, size in self._strata(leverage, terms, shuffled):
            probability[rows] = inclusion_probabilities(leverage[rows], size)
            drawn = systematic_sample(probability[rows], size, 1.0 - generator.random())
            order.append((rows[drawn], rows[~drawn]))
        drawn_rows = np.concatenate([drawn for drawn, _ in order])
        others = np.concatenate([rest for _, rest in order])
        return Ranking(
            np.concatenate([candidates.by(leverage, drawn_rows), others]),
            None,
            {"inclusion_probability": probability},
        )

    @staticmethod
    def _strata(
        leverage: NDArray[np.float64], terms: Terms, shuffled: NDArray[np.int64]
    ) -> list[tuple[NDArray[np.int64], int]]:
        """The groups of rows that are drawn together, and the number of rows to draw from each."""
        left = (terms.size or 0) - terms.n_held
        if not terms.columns:
            return [(shuffled, left)]
        column: LabelColumn = terms.columns[0]
        free = np.bincount(
            column.codes[shuffled],
            weights=inclusion_probabilities(leverage[shuffled], left),
            minlength=len(column.values),
        )
        held = column.counts(terms.held)
        sizes = proportional_sizes(
            free.tolist(),
            left,
            np.maximum(column.floors - held, 0).tolist(),
            np.minimum(column.ceilings - held, column.counts(shuffled)).tolist(),
        )
        return [(shuffled[column.codes[shuffled] == label], size) for label, size in enumerate(sizes)]

    @staticmethod
    def _one_by_one(
        candidates: Candidates, shuffled: NDArray[np.int64], generator: np.random.Generator
    ) -> NDArray[np.int64]:
        # An exponential time of rate w ends first with probability w over the sum; rows of no leverage last.
        with np.errstate(divide="ignore"):
            ends = generator.exponential(size=len(shuffled)) / candidates.normalised_leverage[shuffled]
        return shuffled[np.argsort(ends, kind="stable")]

    def describe(self) -> dict[str, str | float | int]:
        """See ``Strategy.describe``."""
        return {"strategy": "leverage_sampling", "seed": self.seed}


@dataclass(frozen=True, slots=True)
class Spanning:
    """Rows that span the dominant subspace together; see `spanning.spanning_order`, also for the cost.

    Records ``gain``, and as figures ``gap``, ``n_picked``, ``n_passes`` and ``prior_weight``.

    Attributes:
        passes: Largest number of times that the projections are read, 3 or more.
        prior: The initial value of M in every direction, as a share of its value for a random choice.
    """

    passes: int = DEFAULT_PASSES
    prior: float = DEFAULT_PRIOR
    needs_projections = True

    def rank(self, candidates: Candidates, terms: Terms, projections: Blocks | None = None) -> Ranking:
        """See ``Strategy.rank``."""
        spanned = spanning_order(
            candidates, terms, _given("spanning", projections), passes=self.passes, prior=self.prior
        )
        return Ranking(
            spanned.order,
            spanned.gain,
            {"gain": spanned.gain},
            {
                "gap": spanned.gap,
                "n_picked": float(spanned.n_picked),
                "n_passes": float(spanned.n_passes),
                "prior_weight": spanned.prior_weight,
            },
        )

    def describe(self) -> dict[str, str | float | int]:
        """See ``Strategy.describe``."""
        return {"strategy": "spanning", "passes": self.passes, "prior": self.prior}


@dataclass(frozen=True, slots=True)
class Coverage:
    """Rows of high leverage in every part of the subspace; see `coverage.coverage_order`."""

    needs_projections = True

    def rank(self, candidates: Candidates, terms: Terms, projections: Blocks | None = None) -> Ranking:
        """See ``Strategy.rank``."""
        covered = coverage_order(candidates, terms, _given("coverage", projections))
        figures = {"novelty": covered.novelty, "n_picked": float(covered.n_picked)}
        return Ranking(covered.order, covered.gain, {"gain": covered.gain}, figures)

    def describe(self) -> dict[str, str | float | int]:
        """See ``Strategy.describe``."""
        return {"strategy": "coverage"}


def _given(strategy: str, projections: Blocks | None) -> Blocks:
    if projections is None:
        raise ValueError(
            f"Got no projections for the strategy {strategy}, which needs the rows of U_k. Pass them as "
            "blocks in the order of the candidates (method.choice.candidates.projected)."
        )
    return projections


STRATEGIES = (
    *("top_leverage", "coverage", "leverage_sampling", "spanning"),
    *("random", "stratified_random", "length"),
)
"""The names that `strategy_named` accepts; the first is the default."""

_WITHOUT_KNOBS: Mapping[str, Callable[[], Strategy]] = {
    "top_leverage": TopLeverage,
    "coverage": Coverage,
    "spanning": Spanning,
    "length": LongestText,
}


def strategy_named(name: str = STRATEGIES[0], *, seed: int = 0, stratify_by: str | None = None) -> Strategy:
    """A strategy by its name.

    Args:
        name: One of ``STRATEGIES``.
        seed: Seed of the strategies that draw.
        stratify_by: Column of labels, for ``stratified_random``.

    Raises:
        ValueError: No strategy has that name, it needs a column that is not named, or the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"Got seed {seed}; allowed is 0 or more. Choose another.")
    match name:
        case "top_leverage" | "coverage" | "spanning" | "length":
            return _WITHOUT_KNOBS[name]()
        case "leverage_sampling":
            return LeverageSampling(seed)
        case "random":
            return Random(seed)
        case "stratified_random":
            if stratify_by is None:
                raise ValueError(
                    "Got no column to stratify by; stratified_random needs one. Name a column of labels."
                )
            return StratifiedRandom(stratify_by, seed)
        case _:
            raise ValueError(
                f"Got strategy {name!r}; allowed are {', '.join(STRATEGIES)}. Name one of these."
            )


def inclusion_probabilities(weights: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """min(1, t·weight), with the t at which they sum to ``size``; (m,) float64.

    If fewer than ``size`` weights are above 0, these rows get 1 and the others share the rest equally.

    Args:
        weights: (m,) float64, finite and >= 0.
        size: 0 to m.

    Raises:
        InfeasibleError: ``size`` is outside that range.
    """
    m = len(weights)
    if not 0 <= size <= m:
        raise InfeasibleError(f"Got {size} rows to draw of {m}; allowed is 0 to {m}. Draw fewer.")
    n_positive = int(np.count_nonzero(weights))
    if size == 0:
        return np.zeros(m)
    if n_positive <= size:
        rest = (size - n_positive) / (m - n_positive) if n_positive < m else 0.0
        return np.where(weights > 0, 1.0, rest)
    largest = np.argsort(-weights, kind="stable")
    falling = weights[largest]
    tail = np.cumsum(falling[::-1])[::-1]  # summed from the small end, so that it stays positive to the last
    # With the g largest at 1, the next one is below 1 from the first g on for which this holds.
    n_certain = int(np.argmax(falling[:size] * (size - np.arange(size)) < tail[:size]))
    if falling[n_certain] * (size - n_certain) >= tail[n_certain]:
        n_certain = size
    probabilities = np.ones(m)
    drawn = largest[n_certain:]
    probabilities[drawn] = np.minimum(weights[drawn] / tail[n_certain] * (size - n_certain), 1.0)
    return probabilities


def systematic_sample(probabilities: NDArray[np.float64], size: int, start: float) -> NDArray[np.bool_]:
    """The drawn rows, (m,) bool: a row is drawn if a mark falls into its stretch of cumulated probability.

    The marks are ``start``, ``start`` + 1, ...; for a start that is uniform on (0, 1] each row is drawn with
    its probability, whatever the order of the rows.

    Args:
        probabilities: (m,) float64 in [0, 1], summing to ``size`` but for rounding.
        size: Number of rows to draw.
        start: In (0, 1].
    """
    certain = probabilities >= 1.0
    drawn = certain.copy()
    n_left = size - int(np.count_nonzero(certain))
    others = np.flatnonzero(~certain & (probabilities > 0))
    if n_left > 0 and others.size:
        ends = np.cumsum(probabilities[others])
        ends[-1] = n_left  # on paper it is; a mark must not fall behind the end
        drawn[others[np.searchsorted(ends, start + np.arange(n_left), side="left")]] = True
    return drawn


def _shuffled(candidates: Candidates, generator: np.random.Generator) -> NDArray[np.int64]:
    """All rows in random order, which depends on their tie order and not on their places."""
    by_tie_order = np.argsort(candidates.tie_order)
    shuffled: NDArray[np.int64] = by_tie_order[generator.permutation(candidates.n)]
    return shuffled


def _place_within(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each entry, the number of equal entries before it."""
    together = np.argsort(codes, kind="stable")
    ordered = codes[together]
    first = np.searchsorted(ordered, ordered, side="left")
    place = np.empty(len(codes), dtype=np.int64)
    place[together] = np.arange(len(codes)) - first
    return place
