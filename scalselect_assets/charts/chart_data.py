"""The numbers that the charts draw."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EnergyCurve:
    """Cumulative energy by number of directions, thinned if there are many.

    Attributes:
        directions: Numbers of directions, ascending, from 0; ``k`` is among them.
        energy: Share of the energy that each number of leading directions holds.
        k: Number of directions that are kept.
        k_energy: Share of the energy that the kept directions hold.
        rank: Numerical rank of the centred embeddings.
        dimension: Length of a vector.
        rule: The rule that chose k, in words.
    """

    directions: tuple[int, ...]
    energy: tuple[float, ...]
    k: int
    k_energy: float
    rank: int
    dimension: int
    rule: str


@dataclass(frozen=True, slots=True)
class LeverageBin:
    """Numbers of samples in the pool and in the selection with a normalised leverage in [low, high)."""

    low: float
    high: float
    pool: int
    selected: int


@dataclass(frozen=True, slots=True)
class LeverageProfile:
    """The distribution of leverage over the pool.

    Attributes:
        bins: Adjacent and ascending, each a quarter of an octave wide. If the first one begins at 0, it holds
            all values that are too small to be distinguished.
        ranks: Numbers of samples, ascending.
        values: For each of ``ranks``, the largest value of a fixed grid that so many samples reach. It is at
            most 1.1 % below the exact normalised leverage at that rank, and exact at both ends.
        cut: Normalised leverage of the last selected sample, if the selection is exactly the top by leverage;
            otherwise None.
        leverage_share: Share of the pool's normalised leverage that the selected samples hold.
    """

    bins: tuple[LeverageBin, ...]
    ranks: tuple[int, ...]
    values: tuple[float, ...]
    cut: float | None
    leverage_share: float


@dataclass(frozen=True, slots=True)
class Churn:
    """Samples of the previous selection that stayed and went, new ones, and the share that went."""

    stayed: int
    came: int
    went: int
    share: float
