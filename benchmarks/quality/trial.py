"""One seed of one pool: the base model is tuned on everything and on each choice, and asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.quality.choosing import ScoredPool
from benchmarks.quality.pools import Questions
from benchmarks.quality.presets import QualityPreset
from benchmarks.quality.tuning import Encoded, Trainee, Training

FULL: Final = "everything"
BASE: Final = "the base model"


@dataclass(frozen=True, slots=True)
class TrialRun:
    """A fine-tuning and what came of it.

    Attributes:
        name: The strategy, or `FULL` or `BASE`.
        share: Share of the pool that was trained on.
        seed: Of the pool, the draw and the order of the data.
        rows: Rows trained on.
        accuracy: By skill, of the held-out questions.
        groups: Distinct groups among the rows.
        noise: Share of them with a picture of noise.
        wrong: Share of them with a wrong answer.
        tail: Share of them that show or ask for something rare.
        distinct: Their distinct share (`method.choice.cells`); None for everything and for the base.
        training: What it took.
        notes: Further numbers.
    """

    name: str
    share: float
    seed: int
    rows: int
    accuracy: Mapping[str, float]
    groups: int
    noise: float
    wrong: float
    tail: float
    distinct: float | None
    training: Training
    notes: Mapping[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """The mean of the skills."""
        return float(np.mean(list(self.accuracy.values())))


class Trial:
    """Trains on choices of one pool, each time from the same base model.

    Attributes:
        weights: Of the base model.
    """

    def __init__(
        self,
        trainee: Trainee,
        base: Mapping[str, Any],
        scored: ScoredPool,
        test: Questions,
        preset: QualityPreset,
        seed: int,
    ) -> None:
        self._trainee, self.weights, self._scored = trainee, base, scored
        self._preset, self._seed, self._test = preset, seed, test
        self._data: Encoded = trainee.encoded(scored.pool)
        self._asked = trainee.encoded(test)

    def chosen(self, name: str, share: float, notes: Mapping[str, float] | None = None) -> TrialRun:
        """Choose by a strategy and train on the choice."""
        rows = self._scored.choose(name, share, self._seed)
        return self._run(name, share, rows, notes or {})

    def everything(self) -> TrialRun:
        """Train on the whole pool."""
        return self._run(FULL, 1.0, np.arange(len(self._scored.pool)), {})

    def base(self) -> TrialRun:
        """Train on nothing."""
        return self._run(BASE, 0.0, np.empty(0, np.int64), {})

    def _run(self, name: str, share: float, rows: NDArray[np.int64], notes: Mapping[str, float]) -> TrialRun:
        self._trainee.model.load_state_dict(self.weights)
        training = Training()
        if len(rows):
            training = self._trainee.train(
                self._data,
                rows,
                epochs=self._preset.epochs,
                batch=self._preset.batch,
                rate=self._preset.rate,
                seed=self._seed,
            )
        pool = self._scored.pool
        some = bool(len(rows))
        return TrialRun(
            name=name,
            share=share,
            seed=self._seed,
            rows=len(rows),
            accuracy=_by_skill(self._trainee.right(self._asked), self._test.sources),
            groups=len(np.unique(pool.group[rows])),
            noise=float(pool.noise[rows].mean()) if some else 0.0,
            wrong=float(pool.wrong[rows].mean()) if some else 0.0,
            tail=float(pool.tail[rows].mean()) if some else 0.0,
            distinct=self._scored.cells(len(rows)).distinct_share(rows) if 0 < share < 1 else None,
            training=training,
            notes=notes,
        )


def copied(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's weights, so that every training begins from them."""
    return {name: value.detach().clone() for name, value in state.items()}


def _by_skill(right: NDArray[np.bool_], skills: Sequence[str]) -> dict[str, float]:
    of_row = np.array(skills)
    return {skill: float(right[of_row == skill].mean()) for skill in sorted(set(skills))}
