"""Advice without training: whether a choice repeats itself, from the comparison that is made anyway.

The measure is `distinct_share`, how many different random cells of the subspace the chosen rows lie in for
each row (`method.choice.cells`). Random choice shows the redundancy of the pool; a choice that is less
distinct spends its budget on copies. The number says nothing about accuracy by itself: see
docs/evidence.md.
"""

from dataclasses import dataclass
from typing import Any, Final

import dagster as dg
import polars as pl

from scalselect_assets.choice.comparison import CHOICE, means

CHECK: Final = "choice_is_as_distinct_as_random"
TOLERANCE: Final = 0.95
"""A choice repeats itself where its distinct share is below this share of random's."""


@dataclass(frozen=True, slots=True)
class Repetition:
    """The distinctness of the chosen rows, beside as many random ones.

    Attributes:
        choice: Distinct share of the choice, in (0, 1].
        random: The mean of random choices of the same size.
        best: The compared strategy with the highest distinct share.
        best_share: Its distinct share.
    """

    choice: float
    random: float
    best: str
    best_share: float

    @property
    def against_random(self) -> float:
        """The choice's share over random's; below 1 the choice repeats itself more than random."""
        return self.choice / self.random

    @property
    def repeats_itself(self) -> bool:
        """Whether the choice is clearly less distinct than random."""
        return self.against_random < TOLERANCE

    def advice(self) -> str:
        """One or two sentences for the user."""
        compared = f"{self.against_random:.0%} as distinct as a random choice of its size"
        if not self.repeats_itself:
            return f"The choice is {compared}."
        better = (
            f"--strategy {self.best} (distinct share {self.best_share:.2f}, here {self.choice:.2f}) or "
            if self.best_share > self.choice and self.best not in {CHOICE, "random", "stratified_random"}
            else ""
        )
        return (
            f"The choice repeats itself: it is {compared}. Try {better}--near-duplicates suggested, and see "
            "docs/choosing.md."
        )

    def metadata(self) -> dict[str, Any]:
        """Plain numbers and the sentence, for the UI."""
        return {"distinct_against_random": self.against_random, "advice": self.advice()}


def repetition(compared: pl.DataFrame) -> Repetition | None:
    """The repetition that a comparison shows; None where it lacks the choice or random."""
    if "distinct_share" not in compared.columns:  # written before there was this measure
        return None
    shares = dict(means(compared).select("strategy", "distinct_share").iter_rows())
    choice, random = shares.get(CHOICE), shares.get("random")
    if choice is None or random is None:
        return None
    best = max((name for name in shares if name != CHOICE), key=lambda name: shares[name])
    return Repetition(choice, random, best, shares[best])


def repetition_check(found: Repetition | None) -> dg.AssetCheckResult:
    """Warns where the choice repeats itself more than random; passes where nothing was compared."""
    return dg.AssetCheckResult(
        check_name=CHECK,
        passed=found is None or not found.repeats_itself,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={} if found is None else found.metadata(),
    )
