"""The settings of a training run, and which of them change the result."""

from typing import Any, Literal, Self

import dagster as dg
from pydantic import Field, model_validator

# Fields that change the duration of a run or the files on the way, but no weight.
_NO_EFFECT = {"save_every", "workers", "train_again", "other_model"}


class Recipe(dg.Config):
    """Run configuration of `training_run`; the defaults follow LLaVA's second stage.

    The projector and the language model are trained, the vision tower is frozen, the learning rate falls
    along a cosine after a short warm-up, and only answers carry loss. LLaVA sees its 665,000 rows once, 128
    at a step; a subset of some thousands takes smaller steps and more of them.
    """

    epochs: float = Field(default=3.0, gt=0, description="How often every row is seen.")
    max_steps: int | None = Field(
        default=None, ge=1, description="Number of optimizer steps; overrides epochs."
    )
    batch_size: int = Field(default=8, ge=1, description="Rows in one optimizer step.")
    micro_batch_size: int = Field(
        default=1,
        ge=1,
        description="Rows that go through the model together; batch_size must be a multiple of it. Memory "
        "grows in proportion, and rows of different length are padded.",
    )
    learning_rate: float | None = Field(
        default=None, gt=0, le=1, description="Highest learning rate; by default 2e-5, and 2e-4 with LoRA."
    )
    warmup: float = Field(
        default=0.03, ge=0, lt=1, description="Share of the steps in which the learning rate rises."
    )
    lora: bool = Field(
        default=False,
        description="Train low-rank adapters of the linear layers instead of the weights.",
    )
    lora_rank: int = Field(default=16, ge=1, le=1024, description="Rank of the adapters; alpha is twice it.")
    freeze_vision_tower: bool = Field(
        default=True, description="Leave the vision tower unchanged; the projector is trained in either case."
    )
    max_length: int | None = Field(
        default=None,
        ge=1,
        description="Largest number of tokens in a row, by default as many as the model takes. Longer rows "
        "are left out and recorded; no row is cut, because that would lose image tokens.",
    )
    save_every: int = Field(default=50, ge=1, description="Optimizer steps between two checkpoints.")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Precision of the computation. With bfloat16, trained weights are still kept in "
        "float32, but frozen weights under LoRA are not.",
    )
    activation_checkpointing: bool = Field(
        default=False, description="Compute activations twice instead of keeping them: less memory, slower."
    )
    workers: int = Field(default=0, ge=0, le=128, description="Processes that prepare rows ahead.")
    device: Literal["auto", "cpu"] = Field(default="auto", description="auto uses a GPU if there is one.")
    other_model: bool = Field(
        default=False,
        description="Train even if weights, configuration or processor of the model are not those that the "
        "samples were chosen for.",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Decides the order of rows and LoRA's start.")
    train_again: bool = Field(
        default=False, description="Train from the start even if the result exists already."
    )

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self

    @property
    def highest_learning_rate(self) -> float:
        """The learning rate after the warm-up."""
        return self.learning_rate or (2e-4 if self.lora else 2e-5)

    def result_settings(self) -> dict[str, Any]:
        """The settings that may change the trained weights."""
        return {**self.model_dump(exclude=_NO_EFFECT), "learning_rate": self.highest_learning_rate}
