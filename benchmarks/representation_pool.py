"""The samples of the representation benchmark: generated conversations about generated images."""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Final

import numpy as np
from PIL import Image

from benchmarks.representation_speech import TEXT_TOKENS, Speech
from scalselect_assets.method.representation.conversation import Conversation
from scalselect_assets.method.representation.encoder import ChatSample

_TEXT_SHAPES: Final = 0.6180339887498949  # steps of the golden ratio spread evenly however many are taken
_IMAGE_SIZES: Final = ((640, 480), (480, 640), (640, 427), (500, 375), (640, 640), (640, 360), (1024, 768))


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """Reads images that were written before, so from the page cache; a worker process needs only the path."""

    folder: Path

    def __call__(self, reference: str) -> bytes:
        """The file's bytes."""
        return (self.folder / reference).read_bytes()


@dataclass(frozen=True, slots=True)
class PicturePool:
    """Samples for several rounds, no two of which have a sample in common.

    Attributes:
        reuse: So many samples of a round share an image on average.
        rounds: The samples of each round.
    """

    reuse: float
    rounds: tuple[tuple[ChatSample, ...], ...]


def make_pools(folder: Path, n: int, reuses: Sequence[float], seed: int, rounds: int) -> list[PicturePool]:
    """Write the images and make a pool for each reuse, with a conversation of its own for every sample.

    A repeated sample has a shape that was seen before, which no sample of a real pool has. Images are read
    again in every round. Any few of a round's samples, taken from the beginning, have images of their own and
    texts of all lengths.
    """
    counts = [math.ceil(n / reuse) for reuse in reuses]
    write_images(folder, max(counts), seed)
    return [
        PicturePool(
            reuse,
            tuple(
                tuple(
                    ChatSample(conversation, (image_name(place % count),))
                    for place, conversation in enumerate(conversations(n, seed, first=(number, turn)))
                )
                for turn in range(rounds)
            ),
        )
        for number, (reuse, count) in enumerate(zip(reuses, counts, strict=True))
    ]


def write_images(folder: Path, n: int, seed: int) -> None:
    """Write so many images, on all cores."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(lambda place: _write_image(folder, place, seed), range(n)))


def conversations(n: int, seed: int, *, first: tuple[int, ...]) -> Iterator[Conversation]:
    """Conversations of all lengths; ``first`` tells those of one round from those of another."""
    speech, typical = Speech((seed, *first)), NormalDist()
    middle, deviation, shortest, longest = TEXT_TOKENS
    for place in range(n):
        spread = math.exp(deviation * typical.inv_cdf(((place + 0.5) * _TEXT_SHAPES) % 1))
        yield speech.converse(round(min(max(middle * spread, shortest), longest)))


def image_name(place: int) -> str:
    """Of the image at a place."""
    return f"{place:06}.jpg"


def _write_image(folder: Path, place: int, seed: int) -> None:
    """Smooth noise at several scales, in the sizes of photographs from the web."""
    generator = np.random.default_rng((seed, place))
    width, height = _IMAGE_SIZES[place % len(_IMAGE_SIZES)]
    picture = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((4, 60), (16, 40), (64, 20), (256, 10)):
        coarse = generator.standard_normal((cells * height // width, cells, 3)) * 40 + 128
        layer = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        picture += (np.asarray(layer, np.float32) - 128) * (strength / 40)
    Image.fromarray((picture + 128).clip(0, 255).astype(np.uint8)).save(
        folder / image_name(place), "JPEG", quality=88
    )
