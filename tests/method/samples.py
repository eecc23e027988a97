"""Samples to represent: conversations written as turns, images drawn from their references."""

import errno
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scalselect_assets.method.representation.conversation import IMAGE, Conversation, Turn
from scalselect_assets.method.representation.encoder import ChatSample, Outcome, Representation, VlmEncoder
from tests.conftest import png_bytes


def read_image(reference: str) -> bytes:
    """``3:90x30`` is the noise of seed 3 with 90 by 30 pixels, ``3`` the same with 48 by 40.

    A function of a module, so that a worker process finds it.
    """
    seed, _, size = reference.partition(":")
    width, height = (int(side) for side in (size or "48x40").split("x"))
    return png_bytes(int(seed), (width, height))


def read_image_or_fail(reference: str) -> bytes:
    """As ``read_image``, but ``missing``, ``broken`` and ``damaged disk`` are what they say."""
    if reference == "missing":
        return Path("/no/such/image.png").read_bytes()
    if reference == "broken":
        return b"not an image"
    if reference == "damaged disk":
        raise OSError(errno.EIO, "Input/output error", reference)
    return read_image(reference)


class Counting:
    """Counts what is read, by reference."""

    def __init__(self, reader: Callable[[str], bytes] = read_image) -> None:
        self._reader = reader
        self.reads: Counter[str] = Counter()

    def __call__(self, reference: str) -> bytes:
        self.reads[reference] += 1
        return self._reader(reference)


def pixels(reference: str) -> Image.Image:
    """The image that a reference stands for."""
    return Image.open(io.BytesIO(read_image(reference))).convert("RGB")


def conversation(*turns: tuple[str, tuple[Any, ...]]) -> Conversation:
    return Conversation(tuple(Turn(role, parts) for role, parts in turns))  # type: ignore[arg-type]


def chat(*turns: tuple[str, tuple[Any, ...]], images: tuple[str, ...] = ("0",)) -> ChatSample:
    """A sample; ``images`` holds one reference per image mark."""
    sample = ChatSample(conversation(*turns), images)
    assert sample.conversation.n_images == len(images)
    return sample


def question(text: str, image: str = "0", answer: str = "Yes") -> ChatSample:
    """A question about one image."""
    return chat(("user", (IMAGE, text)), ("assistant", (answer,)), images=(image,))


SAMPLES = {
    "a one-word answer that the question contains": question("Is it red? Answer Yes or No.", "1"),
    "several turns and a system text": chat(
        ("system", ("Answer briefly.",)),
        ("user", (IMAGE, "빨간 원은 몇 개입니까?")),
        ("assistant", ("둘",)),
        ("user", ("And how many squares are on the left of the largest circle?",)),
        ("assistant", ("Two squares, both of them small and blue.",)),
        images=("2:70x70",),
    ),
    "a second image in a later turn, after its text": chat(
        ("user", (IMAGE, "他们是谁？")),
        ("assistant", ("A",)),
        ("user", ("What is A?", IMAGE)),
        ("assistant", ("A",)),
        images=("3:30x100", "1"),
    ),
    "three images of different shapes in one turn": chat(
        ("user", (IMAGE, IMAGE, IMAGE, "Compare them.")),
        ("assistant", ("The first is larger than the others.",)),
        images=("1", "4:90x30", "2:70x70"),
    ),
    "a wide image": question("What is this?", "4:90x30", "A small blue square."),
    "a tall image": question("What is this?", "5:40x110", "A small blue square."),
}


def represent(
    encoder: VlmEncoder, samples: list[ChatSample], *, batch_tokens: int = 4096
) -> list[Representation]:
    """Outcomes that have to be representations."""
    return representations(encoder.encode(samples, read_image, batch_tokens=batch_tokens))


def representations(outcomes: list[Outcome]) -> list[Representation]:
    assert all(isinstance(outcome, Representation) for outcome in outcomes), outcomes
    return outcomes  # type: ignore[return-value]


def counts(item: Any) -> tuple[int, int, int, int]:
    """The sizes of a representation's token sets."""
    return item.n_tokens, item.n_vision_tokens, item.n_dominant_tokens, item.n_instruction_tokens


def assert_equal(left: list[Outcome], right: list[Outcome]) -> None:
    """Outcomes are the same up to rounding."""
    for first, second in zip(left, right, strict=True):
        if not isinstance(first, Representation) or not isinstance(second, Representation):
            assert first == second
            continue
        assert counts(first) == counts(second)
        assert first.image_sha256 == second.image_sha256
        np.testing.assert_allclose(first.vector, second.vector, atol=1e-5, rtol=0)
        np.testing.assert_allclose(first.vision_attention, second.vision_attention, atol=1e-5, rtol=0)
