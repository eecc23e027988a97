"""The numbers behind the charts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EnergyCurve:
    """Cumulative energy by number of directions, thinned where there are many.

    Attributes:
        directions: Numbers of directions, ascending, from 0; ``k`` is among them.
        energy: Share of the energy that so many leading directions hold.
        k: How many are kept.
        k_energy: The share that they hold.
        rank: Numerical rank of the centred embeddings.
        dimension: Length of a vector.
        rule: What chose k, in words.
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
    """Samples with a normalised leverage in [low, high), of the pool and of the selection."""

    low: float
    high: float
    pool: int
    selected: int


@dataclass(frozen=True, slots=True)
class LeverageProfile:
    """How leverage is spread over the pool.

    Attributes:
        bins: Adjacent, ascending, a quarter of an octave each; the first one begins at 0 where it gathers all
            that is too small to tell apart.
        ranks: Numbers of samples, ascending.
        values: For each of ``ranks``, the largest value of a fixed grid that so many samples reach: at most
            1.1 % below the exact normalised leverage at that rank. Exact at both ends.
        cut: Normalised leverage of the last selected sample, where the selection is exactly the top by
            leverage; None where something else chose it.
        leverage_share: Share of the pool's normalised leverage that the selected samples hold.
    """

    bins: tuple[LeverageBin, ...]
    ranks: tuple[int, ...]
    values: tuple[float, ...]
    cut: float | None
    leverage_share: float


@dataclass(frozen=True, slots=True)
class Churn:
    """What became of the selection before: samples that stayed, came and went, and the share that went."""

    stayed: int
    came: int
    went: int
    share: float
