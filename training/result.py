"""The outcome of a training, and the file that holds it."""

import json
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULT = "result.json"
"""The file of the outcome; it is written last and so completes a folder."""

_PACKAGES = (
    *("torch", "transformers", "accelerate", "peft", "tokenizers", "pillow"),
    *("dagster", "scalselect-dagster"),
)


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a training.

    Attributes:
        folder: Folder of the result.
        data_version: SHA-256 over the tuned weights.
        base_weights_sha256: SHA-256 over the weights that the training began with.
        losses: Points of the loss curve: an optimizer step, and the mean loss per answer token since the
            point before.
        steps: Number of optimizer steps.
        rows: Number of rows that were trained on.
        tokens: Tokens of these rows, image tokens included.
        left_out: Number of rows of the file that were left out, by reason.
        trained_parameters: Number of trained parameters, by part of the model.
        frozen_parameters: Number of frozen parameters, by part of the model.
        packages: Versions of the packages at the end of the training.
        resumed_from: Step of the checkpoint that this run resumed from; 0 if it started anew.
        seconds: Duration of this run.
        made_now: Whether this run made the result; False if it was there already.
    """

    folder: Path
    data_version: str
    base_weights_sha256: str
    losses: tuple[tuple[int, float], ...]
    steps: int
    rows: int
    tokens: int
    left_out: dict[str, int]
    trained_parameters: dict[str, int]
    frozen_parameters: dict[str, int]
    packages: dict[str, str]
    resumed_from: int
    seconds: float
    made_now: bool = True

    @property
    def model_folder(self) -> Path:
        """The tuned model with its processor."""
        return self.folder / "model"

    def fell(self) -> tuple[float, float]:
        """Mean loss over the first and over the last fifth of the curve, each at least one point."""
        n = max(1, len(self.losses) // 5)
        values = [loss for _, loss in self.losses]
        return sum(values[:n]) / n, sum(values[-n:]) / n


def read_result(folder: Path, seconds: float) -> Result:
    """The outcome that is stored in a folder; ``seconds`` is the duration of the run that asks for it."""
    stored = json.loads((folder / RESULT).read_bytes())
    losses = tuple((step, loss) for step, loss in stored["losses"])
    of_this_run = {"folder": folder, "made_now": False, "resumed_from": 0, "seconds": seconds}
    return Result(**{**stored, "losses": losses, **of_this_run})


def installed_packages() -> dict[str, str]:
    """The versions of the packages that a training depends on, without those that are not installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # PEFT is needed for LoRA only
            continue
    return found


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".{path.name}.{os.getpid()}")
    writing.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    writing.replace(path)
