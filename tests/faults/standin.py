"""A target model without weights: what it makes of a sample follows from the sample's text and images alone.

It goes the way of a real one, through the resource, its card and the store, and tells each sample that it
embeds.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scalselect_assets.method.representation import loading
from scalselect_assets.method.representation.encoder import ChatSample, Outcome, Representation
from scalselect_assets.method.representation.model_card import ModelCard
from scalselect_assets.method.representation.rejection import Rejection, RejectionReason
from scalselect_assets.method.representation.workers import ImageReader

MODEL = "stand-in/of-a-model"
DIMENSION = 6
DAMAGED = b"damaged"
"""What an image that cannot be decoded begins with."""


def vector_of(question: str, image: bytes) -> NDArray[np.float32]:
    """What the stand-in makes of a question about an image."""
    seed = hashlib.sha256(question.encode() + image).digest()
    values = np.random.default_rng(list(seed)).normal(size=DIMENSION)
    return (values * 0.7 ** np.arange(DIMENSION) + 1).astype(np.float32)


class StandIn:
    """As much of a ``VlmEncoder`` as the assets use."""

    device = torch.device("cpu")
    ledger: Path | None = None
    """Where each embedded sample is told: a line of process id and question."""
    before_each: Callable[[int], None] | None = None
    """Called with a sample's place before it is embedded."""

    def __init__(self, attention_mass: float) -> None:
        self.card = ModelCard(
            fingerprint=hashlib.sha256(str(attention_mass).encode()).hexdigest()[:16],
            model=MODEL,
            revision=None,
            commit=None,
            model_type="stand-in",
            dtype="float32",
            attention_mass=attention_mass,
            max_tokens=100,
            dimension=DIMENSION,
            n_parameters=0,
            config_sha256="",
            weights_sha256="",
            processor_sha256="",
        )

    def encode_as_done(
        self, samples: Sequence[ChatSample], read_image: ImageReader, **_: Any
    ) -> Iterator[tuple[int, Outcome]]:
        """One outcome after the other, in input order."""
        for place, sample in enumerate(samples):
            if StandIn.before_each is not None:
                StandIn.before_each(place)
            yield place, self._outcome(sample, read_image)

    def _outcome(self, sample: ChatSample, read_image: ImageReader) -> Outcome:
        question = " ".join(sample.conversation.texts("user"))
        try:
            (image,) = map(read_image, sample.images)
        except FileNotFoundError:
            return Rejection(RejectionReason.MISSING_IMAGE, "it is gone")
        if image.startswith(DAMAGED):
            return Rejection(RejectionReason.UNDECODABLE_IMAGE, "it is damaged")
        if self.ledger is not None:
            with self.ledger.open("a") as ledger:
                ledger.write(f"{os.getpid()} {question}\n")
        return Representation(
            vector=vector_of(question, image),
            n_tokens=10,
            n_vision_tokens=4,
            n_dominant_tokens=2,
            n_instruction_tokens=3,
            vision_attention=0.5,
            image_sha256=(hashlib.sha256(image).hexdigest(),),
        )


load_real_encoder = loading.load_encoder


def load(model: str, *, attention_mass: float, **_: Any) -> StandIn:
    """Takes the place of ``loading.load_encoder``."""
    assert model == MODEL
    return StandIn(attention_mass)


def install() -> None:
    """Let this process load the stand-in, whatever is asked for."""
    loading.load_encoder = load  # type: ignore[assignment]
