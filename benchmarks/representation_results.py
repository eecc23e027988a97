"""What the representation benchmark measures, as plain data."""

from dataclasses import dataclass
from statistics import median

from benchmarks.representation_work import Work


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a process that loads one way and runs it; in bytes.

    Attributes:
        load_seconds: From imported libraries to ready.
        resident_before: With libraries imported and nothing loaded.
        loaded: Peak up to when it was loaded.
        resident_loaded: What was resident then.
        peak: Peak of the whole run.
        device_peak: The most that was allocated on a CUDA device.
        weights: Bytes of the weights that are kept, for ours.
    """

    load_seconds: float
    resident_before: int
    loaded: int
    resident_loaded: int
    peak: int
    device_peak: int | None
    weights: int | None


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Seconds per sample of the parts of ours, each alone and one after the other; best of the rounds.

    Attributes:
        preparation: Decoding, processor, template and tokenizer, on one thread.
        tower: Vision tower and projector.
        layer: The first layer.
        rest: Of a run on prepared samples, what is neither.
    """

    preparation: float
    tower: float
    layer: float
    rest: float


@dataclass(frozen=True, slots=True)
class MeasuredSpeed:
    """One way on one pool.

    Attributes:
        way: Which one.
        reuse: Samples per image.
        n_samples: That were clocked.
        mean_tokens: Of them.
        seconds: Of each round.
    """

    way: str
    reuse: float
    n_samples: int
    mean_tokens: float
    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """Samples per second of the fastest round."""
        return self.n_samples / min(self.seconds)

    @property
    def typical(self) -> float:
        """Samples per second of the median round."""
        return self.n_samples / median(self.seconds)


@dataclass(frozen=True, slots=True)
class SpeedComparison:
    """Everything that one process measured, in turns.

    Attributes:
        speeds: Each way on each pool.
        work: Per sample, by reuse.
        matmuls: GFLOP/s of the machine's products.
        breakdown: Of ours on the first pool.
        tokens: Mean number of tokens, vision tokens, dominant and instruction tokens.
        difference: Of the two ways' vectors, largest over all samples, of a vector's largest component.
    """

    speeds: tuple[MeasuredSpeed, ...]
    work: dict[float, Work]
    matmuls: dict[str, float]
    breakdown: Breakdown | None
    tokens: dict[str, float]
    difference: float | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """bfloat16 against float32.

    Attributes:
        n: Samples.
        ranks: Directions kept in float32 and in bfloat16.
        typical: Median over the samples of the largest difference, of a vector's largest component.
        largest: The largest such difference.
        overlap: Shared part of the top 16 % by leverage.
        by: What computed the scores.
    """

    n: int
    ranks: tuple[int, int]
    typical: float
    largest: float
    overlap: float
    by: str
