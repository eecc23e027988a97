"""Rank rules: the number of leading directions that form the dominant subspace of a pool.

The paper keeps a fixed share of the energy. If that share is unknown, two rules read the number from the
data: Gavish & Donoho ask how many directions stand above white noise; Roy & Vetterli ask over how many
directions the energy spreads, with no noise model and no knob. Both need only the spectrum, n and d, which
the moments hold; rules that resample, such as parallel analysis, would need further passes over the rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

# arXiv 2602.11636: the subspace explains 90 % of the energy.
DEFAULT_ENERGY_THRESHOLD = 0.9

# An energy share that equals the threshold on paper may lie some roundings on either side of it; a pool must
# not gain a direction by the order in which its shards were added.
_TIE_TOLERANCE = 1e-9


class RankRule(Protocol):
    """Chooses k from the energies of a pool."""

    def rank(self, spectrum: NDArray[np.float64], n: int, d: int) -> int:
        """The number of directions to keep, in 1..r; 0 only where r is 0.

        Args:
            spectrum: (r,) float64, the nonzero squared singular values of the centred matrix, descending.
            n: Number of rows of that matrix.
            d: Width of that matrix.
        """
        ...

    def describe(self) -> dict[str, str | float | int]:
        """The name and the settings that identify the rule, for display and for hashing."""
        ...


@dataclass(frozen=True, slots=True)
class EnergyThreshold:
    """The fewest directions whose energy share reaches the threshold, as the paper chooses k.

    k is the first count (from 1) whose cumulative share of Σs² is at least ``threshold``, the published
    ``searchsorted(cumulative, threshold) + 1``, never above the numerical rank. A threshold of 1.0 gives the
    rank.

    Below 1 every kept direction is far above the rounding of the eigenvalues: the last kept direction and the
    at most d - k after it hold over 1 - threshold of the energy, so each kept one holds at least
    (1 - threshold) / d of it. At 1 the weakest directions have no such floor and their scores lose digits.

    Attributes:
        threshold: Share in (0, 1].

    Raises:
        ValueError: The threshold is outside (0, 1].
    """

    threshold: float = DEFAULT_ENERGY_THRESHOLD

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"Got energy threshold {self.threshold}; allowed is above 0 and at most 1. "
                f"The paper uses {DEFAULT_ENERGY_THRESHOLD}."
            )

    def rank(self, spectrum: NDArray[np.float64], n: int, d: int) -> int:  # noqa: ARG002
        """See ``RankRule.rank``."""
        # Summed from the small end: what is left after the last direction is exactly zero, so a threshold of
        # 1 needs no special case.
        held_from = np.cumsum(spectrum[::-1])[::-1]
        left_after = np.append(held_from[1:], 0.0)
        allowed_left = (1 - self.threshold) * spectrum.sum() * (1 + _TIE_TOLERANCE)
        return min(int(np.argmax(left_after <= allowed_left)) + 1, len(spectrum))

    def describe(self) -> dict[str, str | float | int]:
        """See ``RankRule.describe``."""
        return {"rule": "energy", "threshold": self.threshold}


@dataclass(frozen=True, slots=True)
class FixedRank:
    """The same number of directions for every pool, or all of them where there are fewer.

    Attributes:
        k: At least 1.

    Raises:
        ValueError: ``k`` is below 1.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(
                f"Got a fixed rank of {self.k}; allowed is 1 or more. Pass how many directions to keep."
            )

    def rank(self, spectrum: NDArray[np.float64], n: int, d: int) -> int:  # noqa: ARG002
        """See ``RankRule.rank``."""
        return min(self.k, len(spectrum))

    def describe(self) -> dict[str, str | float | int]:
        """See ``RankRule.describe``."""
        return {"rule": "fixed", "k": self.k}


@dataclass(frozen=True, slots=True)
class GavishDonoho:
    """The directions that stand above white noise of unknown level.

    Gavish & Donoho (2014), "The optimal hard threshold for singular values is 4/√3": for a matrix that is low
    rank plus noise of equal variance in every entry, keep the singular values above ω(β) times their median,
    which minimises the asymptotic squared error of the matrix. At least one direction is kept.

    Centring takes one dimension from n rows: centred noise is, up to a rotation, an (n - 1, d) matrix of
    independent noise. So β and the median are those of that shape, the median over all min(n - 1, d) singular
    values with the zero ones among them.
    """

    def rank(self, spectrum: NDArray[np.float64], n: int, d: int) -> int:
        """See ``RankRule.rank``.

        Raises:
            ValueError: More than half of the singular values are zero, so they give no noise level. The
                threshold would be zero and would keep every direction, even those that are only rounding.
        """
        rank = len(spectrum)
        if rank == 0:
            return 0
        shorter, longer = sorted((n - 1, d))
        singular_values = np.zeros(shorter)
        singular_values[:rank] = np.sqrt(spectrum)
        median = float(np.median(singular_values))
        if median == 0:
            raise ValueError(
                f"Got {shorter - rank} zero singular values out of {shorter}; the rule 'gavish_donoho' reads "
                "the noise from their median, so half must be nonzero. Use 'energy' or "
                "'effective_rank'; or remove duplicate rows, or standardise if few columns dwarf the others."
            )
        above = np.count_nonzero(singular_values > hard_threshold(shorter / longer) * median)
        return max(int(above), 1)

    def describe(self) -> dict[str, str | float | int]:
        """See ``RankRule.describe``."""
        return {"rule": "gavish_donoho"}


@dataclass(frozen=True, slots=True)
class EffectiveRank:
    """The number of directions over which the singular values spread.

    Roy & Vetterli (2007), "The effective rank: a measure of effective dimensionality": exp(H), where H is the
    Shannon entropy (natural logarithm) of the singular values divided by their sum; not of their squares. It
    is a real number from 1 (one direction) to the rank (all equally strong). The paper does not round; here
    the nearest integer is taken, halves up, so that r equal values give r whatever rounding adds.
    """

    def rank(self, spectrum: NDArray[np.float64], n: int, d: int) -> int:  # noqa: ARG002
        """See ``RankRule.rank``."""
        if len(spectrum) == 0:
            return 0
        share = np.sqrt(spectrum)
        share /= share.sum()
        entropy = -float(share @ np.log(share))
        return min(max(math.floor(math.exp(entropy) + 0.5), 1), len(spectrum))

    def describe(self) -> dict[str, str | float | int]:
        """See ``RankRule.describe``."""
        return {"rule": "effective_rank"}


DEFAULT_RANK_RULE = EnergyThreshold()


def parse_rank_rule(text_or_int: str | int, energy: float = DEFAULT_ENERGY_THRESHOLD) -> RankRule:
    """The rule that a configuration names.

    Args:
        text_or_int: "energy", "gavish_donoho", "effective_rank", or a number of directions, as an integer or
            in digits.
        energy: The threshold of "energy"; the other rules do not read it.

    Raises:
        ValueError: No rule has this name, the number is below 1, or the threshold of "energy" is
            outside (0, 1].
    """
    if isinstance(text_or_int, int) and not isinstance(text_or_int, bool):
        return FixedRank(text_or_int)
    match text_or_int:
        case "energy":
            return EnergyThreshold(energy)
        case "gavish_donoho":
            return GavishDonoho()
        case "effective_rank":
            return EffectiveRank()
        case str(digits) if digits.isascii() and digits.isdigit():
            return FixedRank(int(digits))
        case _:
            raise ValueError(
                f"Got rank rule {text_or_int!r}; allowed are 'energy', 'gavish_donoho', 'effective_rank' or "
                "a number of directions from 1. Use 'energy' for the paper's rule."
            )


def described_rule(described: Mapping[str, Any]) -> RankRule:
    """The rule that ``RankRule.describe`` described."""
    if described["rule"] == "fixed":
        return FixedRank(described["k"])
    return parse_rank_rule(described["rule"], described.get("threshold", DEFAULT_ENERGY_THRESHOLD))


def hard_threshold(beta: float) -> float:
    """Gavish & Donoho's ω(β): the optimal threshold in units of the median singular value.

    ω(β) = λ*(β) / √μ_β, where λ* (their equation 11) is the optimal threshold at known noise and μ_β the
    median of the Marchenko-Pastur law, found numerically: the cubic that the paper offers is off by up to
    0.02.

    Args:
        beta: Shorter over longer side of the matrix, in (0, 1].

    Raises:
        ValueError: ``beta`` is outside (0, 1].
    """
    if not 0 < beta <= 1:
        raise ValueError(
            f"Got aspect ratio {beta}; allowed is above 0 and at most 1. "
            "Pass the shorter side over the longer."
        )
    known_noise = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    return known_noise / math.sqrt(_marchenko_pastur_median(beta))


def _marchenko_pastur_median(beta: float) -> float:
    """The median of the Marchenko-Pastur law of unit variance.

    With x = 1 + β + 2√β·cos(t) the density becomes smooth, so its square-root edges cost no accuracy.
    """
    # Import this here, because every declaration of a selection imports this module to check the rule's name.
    from scipy.integrate import quad
    from scipy.optimize import brentq

    def at(t: float) -> float:
        return 1 + beta + 2 * math.sqrt(beta) * math.cos(t)

    def mass_above(t: float) -> float:
        mass, _ = quad(lambda u: 2 * math.sin(u) ** 2 / (math.pi * at(u)), 0, t, epsabs=1e-13, epsrel=1e-12)
        return float(mass)

    # The interval stops short of π, where the integrand is 0/0 at β = 1; the median lies well inside.
    return at(brentq(lambda t: mass_above(t) - 0.5, 0, 0.99 * math.pi, xtol=1e-13))
