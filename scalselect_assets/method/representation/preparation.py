"""The preparation of a model's input from a conversation and its images, with the role of every token.

An instruction token is every token that is neither vision nor content of an assistant turn: questions, system
text, role words, separators, BOS and the tokens around and between images all count. The published code does
the same except for the tokens around Qwen's images (docs/representation.md lists all differences). Everything
here is plain data and can also run in a worker process.
"""

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image

from scalselect_assets.method.representation.chat import ChatTemplateError, RenderedChat, render_chat
from scalselect_assets.method.representation.conversation import Conversation
from scalselect_assets.method.representation.first_layer import ModelInput, VisionInput
from scalselect_assets.method.representation.image_place import DEFAULT_IMAGE_PLACE, EffectivePlace, placed
from scalselect_assets.method.representation.images import (
    ImageTooLargeError,
    PixelBudget,
    UndecodableImageError,
    decode_image,
)
from scalselect_assets.method.representation.pixel_scale import (
    LEFT_OUT,
    PixelScale,
    as_bytes,
    pixel_scale,
)
from scalselect_assets.method.representation.rejection import Rejection, RejectionReason

_CHARACTERS_PER_TOKEN = 64
"""No prose or code comes near this number. A longer text is refused before any work is done on it."""

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """One sample ready for the model."""

    model_input: ModelInput
    image_sha256: tuple[str, ...]

    def as_tensors(self) -> "Prepared":
        """Inverse of ``for_transport``."""
        return dataclasses.replace(
            self, model_input=_mapped(self.model_input, np.ndarray, torch.from_numpy, {})
        )


class Preparer:
    """Prepares samples for one model. A preparer is picklable, but only one thread may use it at a time."""

    def __init__(
        self,
        processor: Any,
        *,
        image_token_id: int,
        max_tokens: int,
        max_pixels: int,
        image_place: EffectivePlace = DEFAULT_IMAGE_PLACE,
    ) -> None:
        """Take over ``processor``.

        Args:
            processor: A Transformers processor with a chat template and a fast tokenizer.
            image_token_id: Id of the tokens that carry image features.
            max_tokens: Largest number of tokens of a sample; a longer sample is rejected.
            max_pixels: Largest number of pixels of an image; a larger image is rejected without decoding.
            image_place: The place of a row's images in its prompt.
        """
        self.pad_token_id: int = processor.tokenizer.pad_token_id or 0
        self._processor = processor
        self._image_processor = processor.image_processor
        self._pixel_scale = pixel_scale(processor.image_processor)
        self._processor.image_processor = _OncePerGroup(processor.image_processor)
        self.max_pixels = max_pixels
        self._image_place = image_place
        self._image_token_id, self._max_tokens = image_token_id, max_tokens

    @property
    def image_processor(self) -> Any:
        """The processor's own Transformers image processor."""
        return self._image_processor

    @property
    def modules(self) -> list[str]:
        """The names of the modules that a process must import before it can prepare samples."""
        parts = (self._processor, self._processor.tokenizer, self._image_processor)
        return sorted({type(part).__module__ for part in parts})

    def prepare(
        self,
        images: Sequence[str],
        conversations: Sequence[Conversation],
        read_image: Callable[[str], bytes],
    ) -> list[Prepared | Rejection]:
        """Prepare samples that share their images, which are read, decoded and processed once.

        Args:
            images: References to the images, in the order of the image marks.
            conversations: The conversations, one per sample.
            read_image: Function that returns the bytes of an image for its reference.

        Raises:
            OSError: An image cannot be read, for another reason than that it is missing.
        """
        if not images:
            text_only = Rejection(RejectionReason.TEXT_ONLY, "it has no image; add one or leave the row out")
            return [text_only] * len(conversations)
        too_long = [self._beyond_length(conversation) for conversation in conversations]
        refusals = [refused for refused in too_long if refused is not None]
        if len(refusals) == len(too_long):
            return list(refusals)
        found = self._decode(images, read_image)
        if isinstance(found, Rejection):
            return [refused or found for refused in too_long]
        decoded, digests = found
        prepared: list[Prepared | Rejection] = []
        shared: tuple[VisionInput, ...] | None = None
        for conversation, refused in zip(conversations, too_long, strict=True):
            item = refused or self._prepare(conversation, decoded, digests, shared)
            if shared is None and isinstance(item, Prepared):
                shared = item.model_input.images
            prepared.append(item)
        return prepared

    def _decode(
        self, images: Sequence[str], read_image: Callable[[str], bytes]
    ) -> tuple[list[Image.Image], tuple[str, ...]] | Rejection:
        """The pixels and the SHA-256 of each image. An image that a row repeats is decoded once."""
        known: dict[str, tuple[Image.Image, str]] = {}
        budget = PixelBudget(self.max_pixels)
        for position, reference in enumerate(images, start=1):
            try:
                if reference not in known:
                    data = read_image(reference)
                    known[reference] = (
                        decode_image(data, self.max_pixels),
                        hashlib.sha256(data).hexdigest(),
                    )
                budget.spend(known[reference][0])
            except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
                return Rejection(RejectionReason.MISSING_IMAGE, f"image {position}: {error}")
            except (ImageTooLargeError, UndecodableImageError) as error:
                return Rejection(error.reason, f"image {position}: {error}")
        return [known[name][0] for name in images], tuple(known[name][1] for name in images)

    def _beyond_length(self, conversation: Conversation) -> Rejection | None:
        """The rejection of a conversation if its size alone shows that it cannot fit the model's length."""
        n_characters = sum(map(len, conversation.texts("system", "user", "assistant")))
        found = (
            f"{conversation.n_images:,} images"
            if conversation.n_images > self._max_tokens
            else f"{len(conversation.turns):,} turns"
            if len(conversation.turns) > self._max_tokens
            else f"{n_characters:,} characters of text"
            if n_characters > _CHARACTERS_PER_TOKEN * self._max_tokens
            else None
        )
        if found is None:
            return None
        return Rejection(
            RejectionReason.TOO_LONG,
            f"{found}; the model takes {self._max_tokens:,} tokens: shorten or split the conversation",
        )

    def _prepare(
        self,
        conversation: Conversation,
        images: list[Image.Image],
        digests: tuple[str, ...],
        shared: tuple[VisionInput, ...] | None,
    ) -> Prepared | Rejection:
        """Prepare one sample; ``shared`` holds the same images as processed for another sample."""
        try:
            chat = self._rendered(conversation)
        except ChatTemplateError as error:
            return Rejection(RejectionReason.TEMPLATE_REFUSED, str(error))
        try:
            inputs = self.model_inputs(chat, images, LEFT_OUT if self._pixel_scale else {})
        # The tokenizer itself raises a TypeError for a lone surrogate.
        except (ValueError, TypeError) as error:
            return Rejection(RejectionReason.PROCESSOR_REFUSED, f"the model's processor refuses it: {error}")
        except MemoryError:
            return Rejection(
                RejectionReason.TOO_LARGE,
                f"its {len(images)} image(s) do not fit the memory while they are processed; use fewer or "
                "smaller ones",
            )
        if self._pixel_scale:
            inputs["pixel_values"] = as_bytes(inputs["pixel_values"])
        return self._with_roles(chat, inputs, digests, shared)

    def _rendered(self, conversation: Conversation) -> RenderedChat:
        """The prompt of a sample, with its images moved to their place."""
        return render_chat(self._processor, placed(conversation, self._image_place))

    def model_inputs(
        self, chat: RenderedChat, images: list[Image.Image], about_images: Mapping[str, Any] = _NOTHING
    ) -> dict[str, Any]:
        """The processor's outputs for one sample as tensors, with the character offsets of every token.

        Args:
            chat: The prompt.
            images: The images for the prompt's image marks, in order.
            about_images: Further options of the image processor.
        """
        bos = self._processor.tokenizer.bos_token
        outputs = dict(
            self._processor(
                text=[chat.text],
                images=[images],
                # Only for images: converting the text's lists would take longer than everything else.
                images_kwargs={"return_tensors": "pt", **about_images},
                # A template that writes the BOS token itself must not get a second one.
                add_special_tokens=not (bos and chat.text.startswith(bos)),
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                # Rows beyond the model's length are rejected with their counts. They are never cut, even if
                # the tokenizer's own settings ask for it.
                truncation=False,
                padding=False,
                verbose=False,
            )
        )
        return {
            name: value
            if isinstance(value, torch.Tensor) or name == "text_replacement_offsets"
            else torch.from_numpy(np.asarray(value))
            for name, value in outputs.items()
        }

    def stand_in(
        self, conversation: Conversation, images: list[Image.Image]
    ) -> tuple[dict[str, torch.Tensor], list[int]]:
        """The processor's outputs for a conversation when other images replace the conversation's own.

        Args:
            conversation: A whole sample that can be prepared.
            images: One image per image mark, with the sizes of the sample's own images.

        Returns:
            The processor's vision inputs by name, and the number of vision tokens that each image fills.

        Raises:
            ChatTemplateError: The template refuses the conversation.
            ValueError: The processor refuses the conversation or an image.
        """
        inputs = self.model_inputs(self._rendered(conversation), images)
        return self._vision_inputs(inputs), self._tokens_by_image(inputs)

    def _vision_inputs(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {name: inputs[name] for name in self._image_processor.model_input_names if name in inputs}

    def _tokens_by_image(self, inputs: dict[str, Any]) -> list[int]:
        """The number of image tokens in the text that the processor wrote in the place of each image."""
        vision = inputs["input_ids"][0] == self._image_token_id
        starts, ends = inputs["offset_mapping"][0].unbind(-1)
        (replacements,) = inputs["text_replacement_offsets"]
        return [
            int(vision[(starts < end) & (ends > begin)].sum())
            for begin, end in (replacement["new_span"] for replacement in replacements)
        ]

    def _with_roles(
        self,
        chat: RenderedChat,
        inputs: dict[str, Any],
        digests: tuple[str, ...],
        shared: tuple[VisionInput, ...] | None,
    ) -> Prepared | Rejection:
        """Separate vision, instruction and answer tokens."""
        input_ids = inputs["input_ids"][0]
        if len(input_ids) > self._max_tokens:
            return Rejection(
                RejectionReason.TOO_LONG,
                f"{len(input_ids):,} tokens; the model takes {self._max_tokens:,}, and cutting would "
                "lose image tokens: shorten or split the conversation",
            )
        starts, ends = inputs["offset_mapping"][0].unbind(-1)
        (replacements,) = inputs["text_replacement_offsets"]
        answer = torch.zeros_like(input_ids, dtype=torch.bool)
        for begin, end in _expanded_spans(chat.answer_spans, replacements):
            if begin == end:
                continue  # an empty answer has no content, so no token belongs to it
            # A token across the border belongs to the answer, since it carries part of its content. A token
            # of width zero is white space, which some tokenizers leave out of their offsets.
            answer |= (starts < end) & (ends > begin) | (starts == ends) & (begin < starts) & (starts <= end)
        vision = input_ids == self._image_token_id
        n_tokens = self._tokens_by_image(inputs)
        if sum(n_tokens) != (n_vision := int(vision.sum())):
            return Rejection(
                RejectionReason.PROCESSOR_REFUSED,
                f"{n_vision} image tokens, of which the images fill {sum(n_tokens)}: the text contains the "
                "model's own image token; remove it",
            )
        model_input = ModelInput(
            input_ids=input_ids,
            token_inputs={name: inputs[name][0] for name in inputs if name.endswith("token_type_ids")},
            vision=vision.nonzero().squeeze(1),
            instruction=(~vision & ~answer).nonzero().squeeze(1),
            images=shared or _by_image(self._vision_inputs(inputs), digests, n_tokens, self._pixel_scale),
        )
        return Prepared(model_input, digests)


class _OncePerGroup:
    """An image processor that remembers its result for the last images.

    The processor classes call it for every conversation; conversations with the same images come together.
    """

    def __init__(self, image_processor: Any) -> None:
        self._image_processor = image_processor
        self._images: list[Any] = []
        self._options: dict[str, Any] = {}
        self._processed: Any = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_image_processor":
            raise AttributeError(name)  # not set up yet, for example during unpickling
        return getattr(self._image_processor, name)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "_image_processor": self._image_processor,
            "_images": [],
            "_options": {},
            "_processed": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __call__(self, images: Any, **options: Any) -> Any:
        from transformers.image_utils import make_flat_list_of_images

        flat = make_flat_list_of_images(images)
        same = len(flat) == len(self._images) and all(a is b for a, b in zip(flat, self._images, strict=True))
        if not same or options != self._options:
            self._processed = self._image_processor(images, **options)
            self._images, self._options = flat, options
        # The container is copied because some processors remove entries that they have used.
        return copy.copy(self._processed)


def _expanded_spans(
    spans: Iterable[tuple[int, int]], replacements: Sequence[dict[str, Any]]
) -> Iterator[tuple[int, int]]:
    """Move character spans past the image tokens that the processor multiplied before them."""
    for begin, end in spans:
        gained = 0
        for replacement in replacements:
            if replacement["span"][1] <= begin:
                gained = replacement["new_span"][1] - replacement["span"][1]
        yield begin + gained, end + gained


def _by_image(
    inputs: dict[str, torch.Tensor],
    digests: tuple[str, ...],
    n_tokens: Sequence[int],
    scale: PixelScale | None,
) -> tuple[VisionInput, ...]:
    """Split the processor's vision inputs of one sample by image, if that is possible.

    An input has either one entry per image, or entries in proportion to the image's tokens (patches, crops).
    If an input is per sample (padded together, or counts), the sample's images stay together.
    """
    sizes: dict[str, list[int]] = {}
    for name, value in inputs.items():
        if len(digests) == 1:
            sizes[name] = [len(value)]
        elif len(value) == len(digests):
            sizes[name] = [1] * len(digests)
        elif all(len(value) * count % sum(n_tokens) == 0 for count in n_tokens):
            sizes[name] = [len(value) * count // sum(n_tokens) for count in n_tokens]
        else:
            return (VisionInput("|".join(digests), inputs, sum(n_tokens), scale),)
    pieces = {name: value.split_with_sizes(sizes[name]) for name, value in inputs.items()}
    return tuple(
        VisionInput(digest, {name: pieces[name][place] for name in inputs}, count, scale)
        for place, (digest, count) in enumerate(zip(digests, n_tokens, strict=True))
    )


def for_transport(prepared: Sequence[Prepared | Rejection]) -> list[Prepared | Rejection]:
    """A group with NumPy arrays, which pass between processes several times as fast as tensors.

    Data that its samples share, mainly the pixels, is passed once.
    """
    seen: dict[int, Any] = {}
    return [
        dataclasses.replace(
            item, model_input=_mapped(item.model_input, torch.Tensor, torch.Tensor.numpy, seen)
        )
        if isinstance(item, Prepared)
        else item
        for item in prepared
    ]


def _mapped(value: Any, kind: type, change: Callable[[Any], Any], seen: dict[int, Any]) -> Any:
    """The same structure of dataclasses, dictionaries and tuples with every ``kind`` in it changed.

    ``seen`` maps the identity of each image to its changed image, so that shared images stay shared.
    """
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(item, kind, change, seen) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_mapped(item, kind, change, seen) for item in value)
    if isinstance(value, ModelInput | VisionInput):
        parts = {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
        changed = dataclasses.replace(value, **_mapped(parts, kind, change, seen))
        if isinstance(value, VisionInput):
            seen[id(value)] = changed
        return changed
    return value
