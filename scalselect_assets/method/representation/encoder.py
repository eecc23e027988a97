"""The representation of a sample: the mean output of the target VLM's first layer over the dominant tokens.

Paper (arXiv 2602.11636), section 3, for vision tokens V and instruction tokens U of one sample:

1. p_j = attention of the first language-model layer, averaged over heads and over u in U, for j in V,
   normalised to sum to one;
2. V' = the fewest tokens of V whose share of p exceeds τ (the token that crosses is kept);
3. x = mean over V' of the first layer's output: ``hidden_states[1]`` of the full model, before any norm.

This module decides which samples are computed together: samples with the same images follow each other, an
image passes the vision tower once, and batches are filled by tokens, not by samples. ``first_layer`` does the
computation. On a GPU several batches are under way at a time, so that the GPU has work while the host waits
for one of them. A row that cannot be represented gets a typed rejection in its place.
"""

import gc
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from scalselect_assets.method.interrupts import deferred
from scalselect_assets.method.representation.conversation import Conversation
from scalselect_assets.method.representation.feature_cache import FeatureCache
from scalselect_assets.method.representation.first_layer import (
    FeatureCountError,
    FirstLayer,
    FirstLayerState,
    VisionInput,
)
from scalselect_assets.method.representation.model_card import ModelCard
from scalselect_assets.method.representation.preparation import Prepared, Preparer
from scalselect_assets.method.representation.rejection import Rejection, RejectionReason
from scalselect_assets.method.representation.workers import ImageReader, Preparation

_GROUP_SIZE = 64  # samples about the same images that are prepared together
_GROUPS_AHEAD = 4  # prepared while the model works; a large image takes 100 MB
_FEATURE_BYTES = 512 * 2**20  # image features kept for samples that share them
_VALUES_PER_TOKEN = 14 * 14 * 3  # of an image per vision token, in the most common vision tower
# Batches whose later steps wait while the next batch is started. A CPU computes at once, so none waits.
_UNDER_WAY = {"cpu": 0, "cuda": 2}


@dataclass(frozen=True, slots=True)
class ChatSample:
    """One row to represent: its conversation and, per image mark, a reference to the image."""

    conversation: Conversation
    images: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Representation:
    """The representation of one sample, with the counts and images that it was made from.

    Attributes:
        vector: (d,) float32.
        n_tokens: Length of the model's input.
        n_vision_tokens: Number of image tokens in the model's input.
        n_dominant_tokens: Number of kept vision tokens; the vector is the mean over them.
        n_instruction_tokens: Number of tokens that are neither vision nor content of an answer.
        vision_attention: Share of the instruction's attention that falls on vision tokens, in [0, 1].
        image_sha256: SHA-256 of each image's bytes, in order.
    """

    vector: NDArray[np.float32]
    n_tokens: int
    n_vision_tokens: int
    n_dominant_tokens: int
    n_instruction_tokens: int
    vision_attention: float
    image_sha256: tuple[str, ...]


Outcome: TypeAlias = Representation | Rejection


@dataclass(frozen=True, slots=True, eq=False)
class Examined:
    """One sample's representation, and the first layer's state from which it was made."""

    state: FirstLayerState
    representation: Representation


class VlmEncoder:
    """A target model cut down to its first language-model layer, made by ``loading.load_encoder``.

    Attributes:
        card: The identity of the model.
        preparer: The preparer that turns samples into model inputs.
    """

    def __init__(self, card: ModelCard, first_layer: FirstLayer, preparer: Preparer) -> None:
        """Join the card, the first layer and the preparer."""
        self.card = card
        self._first_layer, self.preparer = first_layer, preparer
        self._preparation = Preparation(preparer)

    @property
    def device(self) -> torch.device:
        """The device that the model runs on."""
        return self._first_layer.device

    @property
    def base_model(self) -> Any:
        """The Transformers model without its decoder layers: its configuration and its vision part."""
        return self._first_layer.model

    def encode(
        self,
        samples: Sequence[ChatSample],
        read_image: ImageReader,
        *,
        batch_tokens: int = 4096,
        workers: int = 0,
    ) -> list[Outcome]:
        """Represent samples, with one outcome per sample in input order. See ``encode_as_done``."""
        done = dict(self.encode_as_done(samples, read_image, batch_tokens=batch_tokens, workers=workers))
        return [done[place] for place in range(len(samples))]

    def encode_as_done(
        self,
        samples: Sequence[ChatSample],
        read_image: ImageReader,
        *,
        batch_tokens: int = 4096,
        workers: int = 0,
    ) -> Iterator[tuple[int, Outcome]]:
        """Represent samples in the order that saves most work.

        ``batch_tokens``, ``workers`` and the other samples change an outcome by float rounding only.

        Args:
            samples: The samples to represent.
            read_image: Function that returns the bytes of an image for its reference. It raises
                ``FileNotFoundError`` or ``PermissionError`` for an image that the row cannot have. It must be
                picklable if there are ``workers``.
            batch_tokens: Number of tokens that are computed together; memory grows in proportion. A longer
                sample is computed alone, and a batch that does not fit the memory is computed in halves.
            workers: Number of processes that read, decode and tokenize ahead; 0 for a thread.

        Yields:
            A sample's place in the input and its outcome. Each place comes once.

        Raises:
            OSError: An image cannot be read, for another reason than that it is missing.
        """
        cache = FeatureCache(_FEATURE_BYTES)
        with closing(self._prepared(samples, read_image, workers)) as prepared:
            yield from self._outcomes(_batches(prepared, batch_tokens), cache, batch_tokens)

    def examine(
        self, sample: ChatSample, read_image: ImageReader, *, batch_tokens: int = 4096
    ) -> Examined | Rejection:
        """Represent one sample by the same code as many samples, and keep the first layer's state.

        Args:
            sample: The sample to represent.
            read_image: The same function as for ``encode_as_done``.
            batch_tokens: Bound on the images that pass the vision tower together, in tokens.

        Returns:
            The representation and its state, or the rejection that ``encode`` returns.

        Raises:
            OSError: An image cannot be read, for another reason than that it is missing.
        """
        (prepared,) = self.preparer.prepare(sample.images, [sample.conversation], read_image)
        if isinstance(prepared, Rejection):
            return prepared
        (state,) = self._states_or_rejections([prepared], FeatureCache(_FEATURE_BYTES), batch_tokens)
        if isinstance(state, Rejection):
            return state
        outcome = _outcome(prepared, state)
        return outcome if isinstance(outcome, Rejection) else Examined(state, outcome)

    def _prepared(
        self, samples: Sequence[ChatSample], read_image: ImageReader, workers: int
    ) -> Generator[tuple[int, Prepared | Rejection], None, None]:
        """Prepare every sample, several groups ahead of their use."""
        groups = deque(_groups(samples))
        pending: deque[tuple[list[int], Future[list[Prepared | Rejection]]]] = deque()
        with self._preparation.by(workers) as submit:
            try:
                while groups or pending:
                    while groups and len(pending) < max(_GROUPS_AHEAD, 4 * workers):
                        images, places = groups.popleft()
                        conversations = [samples[place].conversation for place in places]
                        with deferred():
                            pending.append((places, submit(images, conversations, read_image)))
                    places, future = pending.popleft()
                    with deferred():
                        prepared = future.result()
                    for place, item in zip(places, prepared, strict=True):
                        yield place, item.as_tensors() if workers and isinstance(item, Prepared) else item
            finally:
                for _, future in pending:
                    future.cancel()

    def _outcomes(
        self, batches: Iterable[list[tuple[int, Prepared | Rejection]]], cache: FeatureCache, budget: int
    ) -> Iterator[tuple[int, Outcome]]:
        """The outcomes of all batches; several batches are under way at a time."""
        under_way: deque[_UnderWay] = deque()
        for batch in batches:
            yield from ((place, item) for place, item in batch if isinstance(item, Rejection))
            ready = [(place, item) for place, item in batch if isinstance(item, Prepared)]
            if ready:
                steps = self._steps([item for _, item in ready], cache, budget)
                under_way.append(_UnderWay(ready, steps))
            yield from self._advanced(under_way, _UNDER_WAY[self.device.type], cache, budget)
        yield from self._advanced(under_way, 0, cache, budget)

    def _advanced(
        self, under_way: "deque[_UnderWay]", at_most: int, cache: FeatureCache, budget: int
    ) -> Iterator[tuple[int, Outcome]]:
        """Advance every batch by one step, newest first, until at most ``at_most`` are left."""
        while True:
            if not all(batch.advance() for batch in reversed(under_way)):
                # The batches do not fit the memory together, so each is computed again by itself.
                for batch in under_way:
                    batch.drop()
                self._make_room(cache)
                for batch in under_way:
                    yield from batch.outcomes(self._states_or_rejections(batch.samples, cache, budget))
                under_way.clear()
            while under_way and under_way[0].done:
                batch = under_way.popleft()
                yield from batch.outcomes(batch.states)
            if len(under_way) <= at_most:
                return

    def _states_or_rejections(
        self, batch: Sequence[Prepared], cache: FeatureCache, budget: int
    ) -> Iterator[FirstLayerState | Rejection]:
        """The states of a batch. If it cannot be computed at once, it is halved, down to single images."""
        if not batch:
            return
        states = self._try(batch, cache, budget)
        if not isinstance(states, Rejection):
            yield from states
        elif len(batch) > 1:
            half = len(batch) // 2
            yield from self._states_or_rejections(batch[:half], cache, budget // 2)
            yield from self._states_or_rejections(batch[half:], cache, budget // 2)
        elif budget and states.reason is RejectionReason.TOO_LARGE:
            # Try again with nothing else in memory and with the sample's images one by one.
            yield from self._states_or_rejections(batch, cache, 0)
        else:
            yield states

    def _try(
        self, batch: Sequence[Prepared], cache: FeatureCache, budget: int
    ) -> list[FirstLayerState] | Rejection:
        """The states of a batch, or on failure the rejection for a batch of a single sample."""
        work = _UnderWay([(0, item) for item in batch], self._steps(batch, cache, budget))
        while work.advance() and not work.done:
            pass
        if work.done:
            return work.states
        if isinstance(work.failure, FeatureCountError):
            return Rejection(RejectionReason.PROCESSOR_REFUSED, f"{work.failure}: resize the image")
        work.drop()
        self._make_room(cache)
        n_tokens = max(len(item.model_input) for item in batch)
        return Rejection(
            RejectionReason.TOO_LARGE,
            f"{n_tokens:,} tokens with {len(batch[0].image_sha256)} image(s) do not fit the memory of "
            f"{self.device}, even alone; use fewer or smaller images, or a device with more memory",
        )

    def _make_room(self, cache: FeatureCache) -> None:
        cache.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _steps(
        self, batch: Sequence[Prepared], cache: FeatureCache, budget: int
    ) -> Generator[None, None, list[FirstLayerState]]:
        """The states of a batch, in the steps of ``FirstLayer.steps``; the first one also runs the tower."""
        inputs = [item.model_input for item in batch]
        return (
            yield from self._first_layer.steps(
                inputs,
                self._features([item.images for item in inputs], cache, budget),
                self.card.attention_mass,
            )
        )

    def _features(
        self, images: Sequence[tuple[VisionInput, ...]], cache: FeatureCache, budget: int
    ) -> list[list[torch.Tensor]]:
        """The features of each sample's images. Images that are not in the cache pass the vision tower."""
        wanted = {image.key: image for image in chain.from_iterable(images)}
        features = {key: known for key in wanted if (known := cache.get(key)) is not None}
        for chunk in _chunks([image for key, image in wanted.items() if key not in features], budget):
            keys = [image.key for image in chunk]
            found = dict(zip(keys, self._first_layer.image_features(chunk), strict=True))
            features |= found
            cache.put(found)
        return [[features[image.key] for image in row] for row in images]


class _UnderWay:
    """A batch between its first step and its last.

    Attributes:
        done: Whether the batch's states are computed.
        states: The states, once they are computed.
        failure: The error that stopped the batch before that: lack of memory, or an image of the wrong size.
    """

    def __init__(
        self,
        placed: Sequence[tuple[int, Prepared]],
        steps: Generator[None, None, list[FirstLayerState]],
    ) -> None:
        self._places = [place for place, _ in placed]
        self.samples = [item for _, item in placed]
        self._steps = steps
        self.done = False
        self.states: list[FirstLayerState] = []
        self.failure: Exception | None = None

    def advance(self) -> bool:
        """Take the next step, and return whether it succeeded."""
        try:
            if not self.done:
                next(self._steps)
        except StopIteration as finished:
            self.done, self.states = True, finished.value
        except (FeatureCountError, MemoryError, RuntimeError) as error:
            if not isinstance(error, FeatureCountError) and not is_out_of_memory(error):
                raise
            # The error's traceback keeps the tensors alive.
            self.failure = error.with_traceback(None)
            return False
        return True

    def drop(self) -> None:
        """Release the batch's memory on the device."""
        self._steps.close()

    def outcomes(self, states: Iterable[FirstLayerState | Rejection]) -> Iterator[tuple[int, Outcome]]:
        """The outcome of each sample, with the sample's place."""
        for place, item, state in zip(self._places, self.samples, states, strict=True):
            yield place, state if isinstance(state, Rejection) else _outcome(item, state)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of torch means that memory ran out; torch has no single type for that."""
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sign in str(error) for sign in signs
    )


def _groups(samples: Sequence[ChatSample]) -> list[tuple[tuple[str, ...], list[int]]]:
    """The places of samples that share their images; groups of similar length are next to each other."""
    by_images: dict[tuple[str, ...], list[int]] = {}
    for place, sample in enumerate(samples):
        by_images.setdefault(sample.images, []).append(place)
    lengths = [sum(map(len, sample.conversation.texts("system", "user", "assistant"))) for sample in samples]
    # Rows with several images may share some of them; such rows are then close to each other.
    ordered = sorted(
        by_images.items(),
        key=lambda group: (
            len(group[0]),
            group[0] if len(group[0]) > 1 else (),
            max(lengths[place] for place in group[1]),
        ),
    )
    return [
        (images, places[start : start + _GROUP_SIZE])
        for images, places in ordered
        for start in range(0, len(places), _GROUP_SIZE)
    ]


def _batches(
    prepared: Iterator[tuple[int, Prepared | Rejection]], batch_tokens: int
) -> Iterator[list[tuple[int, Prepared | Rejection]]]:
    """Runs of samples with at most ``batch_tokens`` tokens, and at most twice that with padding."""
    batch: list[tuple[int, Prepared | Rejection]] = []
    total = longest = count = 0
    for place, item in prepared:
        if isinstance(item, Prepared):
            length = len(item.model_input)
            padded = (count + 1) * max(longest, length)
            if count and (total + length > batch_tokens or padded > 2 * batch_tokens):
                yield batch
                batch, total, longest, count = [], 0, 0, 0
            total, longest, count = total + length, max(longest, length), count + 1
        batch.append((place, item))
    if batch:
        yield batch


def _chunks(images: Sequence[VisionInput], budget: int) -> Iterator[list[VisionInput]]:
    """Runs of images that have at most as many values as ``budget`` vision tokens usually have."""
    chunk: list[VisionInput] = []
    held = 0
    for image in images:
        n_values = image.inputs["pixel_values"].numel()
        if chunk and held + n_values > budget * _VALUES_PER_TOKEN:
            yield chunk
            chunk, held = [], 0
        chunk.append(image)
        held += n_values
    if chunk:
        yield chunk


def _outcome(item: Prepared, state: FirstLayerState) -> Outcome:
    if not (np.isfinite(state.vector).all() and np.isfinite(state.vision_attention)):
        return Rejection(RejectionReason.NON_FINITE, "the first layer's attention or output is not finite")
    return Representation(
        vector=state.vector,
        n_tokens=len(item.model_input),
        n_vision_tokens=len(item.model_input.vision),
        n_dominant_tokens=state.n_dominant_tokens,
        n_instruction_tokens=len(item.model_input.instruction),
        vision_attention=state.vision_attention,
        image_sha256=item.image_sha256,
    )
