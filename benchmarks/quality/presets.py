"""How large the model, the pools and the trainings of a preset are."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Size:
    """Widths and layers of the language model and of the vision tower."""

    width: int
    layers: int
    tower_width: int
    tower_layers: int


@dataclass(frozen=True, slots=True)
class QualityPreset:
    """One size of the benchmark.

    Attributes:
        size: Of the model.
        grid: Cells of a side of a picture; a picture has (2 · grid)² vision tokens.
        rows: Rows of a pool.
        tests: Held-out questions.
        base_rows: Captions and terse questions that the base model is trained on.
        base_epochs: How often.
        base_batch: Rows of a step of that.
        base_rate: Its learning rate.
        epochs: Of each fine-tuning.
        batch: Rows of a step of fine-tuning.
        rate: Its learning rate.
        seeds: Pools, draws and orders of the data.
        full_seeds: Seeds that are also trained on everything.
        curve: Shares of the pool that random's learning curve is made of.
        curve_seeds: Seeds of that curve.
        pools: The pools.
        encode_workers: Processes that prepare samples for the product's encoder.
        batch_tokens: Tokens that it computes together.
        time_limit: Seconds after which no further seed of a pool is begun.
    """

    size: Size
    grid: int
    rows: int
    tests: int
    base_rows: int
    base_epochs: float
    base_batch: int
    base_rate: float
    epochs: float
    batch: int
    rate: float
    seeds: int
    full_seeds: int
    curve: tuple[float, ...]
    curve_seeds: int
    pools: tuple[str, ...]
    encode_workers: int
    batch_tokens: int
    time_limit: float


PRESETS: Final = {
    "tiny": QualityPreset(
        size=Size(64, 2, 64, 2),
        grid=2,
        rows=300,
        tests=120,
        base_rows=800,
        base_epochs=1,
        base_batch=32,
        base_rate=1e-3,
        epochs=1,
        batch=16,
        rate=5e-4,
        seeds=2,
        full_seeds=1,
        curve=(),
        curve_seeds=0,
        pools=("world-80-junk",),
        encode_workers=0,
        batch_tokens=4096,
        time_limit=120,
    ),
    "cpu": QualityPreset(
        size=Size(96, 2, 64, 2),
        grid=2,
        rows=2500,
        tests=900,
        base_rows=24_000,
        base_epochs=5,
        base_batch=64,
        base_rate=1.5e-3,
        epochs=4,
        batch=16,
        rate=5e-4,
        seeds=8,
        full_seeds=3,
        curve=(0.04, 0.08, 0.32, 0.64),
        curve_seeds=2,
        pools=("world-20", "world-50", "world-80"),
        encode_workers=0,
        batch_tokens=4096,
        time_limit=1500,
    ),
    "gpu": QualityPreset(
        size=Size(256, 4, 192, 4),
        grid=4,
        rows=24_000,
        tests=4_000,
        base_rows=240_000,
        base_epochs=4,
        base_batch=256,
        base_rate=6e-4,
        epochs=3,
        batch=32,
        rate=3e-4,
        seeds=8,
        full_seeds=2,
        curve=(0.04, 0.08, 0.32, 0.64),
        curve_seeds=2,
        pools=("world-20", "world-50", "world-80"),
        encode_workers=12,
        batch_tokens=65_536,
        time_limit=300,
    ),
}
