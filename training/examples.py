"""From a row of the training file to the model's input: tokens, pixels, and labels on answers only.

The model's own chat template writes the prompt. Few templates mark their answers for Transformers
(``{% generation %}``), so answers are found from the template's structure, as the selection finds them
(`method.representation.chat`), in the same way for every family; if a template does mark them, the labels
agree with its marks. Beside the content of an answer, the model learns the token that ends the turn, so that
the tuned model knows when to stop.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from upath import UPath

from scalselect_assets.method.representation.chat import ChatTemplateError, render_chat
from scalselect_assets.method.representation.image_place import EffectivePlace, placed
from scalselect_assets.method.representation.images import (
    DEFAULT_MAX_PIXELS,
    ImageTooLargeError,
    PixelBudget,
    UndecodableImageError,
    decode_image,
)
from scalselect_assets.method.representation.rejection import Rejection, RejectionReason
from scalselect_assets.resources.forms.embedded import from_data_uri
from scalselect_assets.resources.image_root import ImageRoot
from scalselect_assets.resources.samples import parse_row
from scalselect_assets.resources.trained_fields import GROUNDING_MARKS, TrainedFields, trained_fields
from scalselect_assets.resources.written_json import shorten

IGNORED = -100
"""The label of a token without loss; PyTorch's cross entropy ignores it."""


@dataclass(frozen=True, slots=True)
class TrainingPrompt:
    """One row, ready for the processor: its text, the spans of it that are learnt, and its decoded images."""

    text: str
    learnt: tuple[tuple[int, int], ...]
    images: tuple[Image.Image, ...]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that is not trained on: its position in the training file from 0, its id, and the reason."""

    row: int
    source_id: str | None
    reason: str
    detail: str


class TrainingRows(Dataset[TrainingPrompt]):
    """Rows of a training file as prompts, made on demand. Picklable, for worker processes."""

    def __init__(
        self,
        texts: Sequence[str],
        processor: Any,
        images_folder: str,
        options: dict[str, str],
        image_place: EffectivePlace = "as_written",
        shards_folder: str | None = None,
    ) -> None:
        """Rows whose image references start from ``images_folder``.

        Args:
            texts: The rows' JSON texts.
            processor: Processor of the model.
            images_folder: Local folder or URI; nothing outside it is opened.
            options: Storage options of fsspec, for a folder that is not local.
            image_place: Where images stand in the prompts: the same place as in the selection.
            shards_folder: The folder that addresses of images inside the pool's shards start from.
        """
        self._shards_folder = shards_folder
        self._texts, self._processor, self._image_place = texts, processor, image_place
        self._folder, self._options = images_folder, options

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> TrainingPrompt:
        """The prompt of a row.

        Raises:
            RuntimeError: The prompt cannot be made; `judge` finds such rows before the training starts.
        """
        found = self.prompt(index)
        if isinstance(found, Rejection):
            raise RuntimeError(f"row {index} cannot be trained on any more: {found.reason}: {found.detail}")
        return found

    def source_id(self, index: int) -> str | None:
        """The row's own id."""
        return parse_row(self._texts[index], keep_text_only=True).source_id

    def prompt(self, index: int) -> TrainingPrompt | Rejection:
        """The prompt of a row, or the reason why it has none.

        Raises:
            OSError: An image exists but cannot be read.
        """
        parsed = parse_row(self._texts[index], index, keep_text_only=True)
        if parsed.sample is None:
            return parsed.rejection or Rejection(RejectionReason.MALFORMED_ROW, "it is no row")
        fields = trained_fields(self._texts[index])
        if (refusal := _refuse_unread(fields, self._texts[index])) is not None:
            return refusal
        images = self._images(parsed.sample.images)
        if isinstance(images, Rejection):
            return images
        try:
            chat = render_chat(self._processor, placed(parsed.sample.conversation, self._image_place))
        except ChatTemplateError as error:
            return Rejection(RejectionReason.TEMPLATE_REFUSED, str(error))
        text, learnt = with_turn_ends(chat.text, chat.answer_spans, self._processor.tokenizer)
        # A span for each text of an answer, and one weight for all texts of a turn.
        weights = (
            weight
            for turn, weight in zip(parsed.sample.conversation.turns, fields.weights, strict=True)
            for part in turn.parts
            if turn.role == "assistant" and isinstance(part, str)
        )
        taught = (span for span, weight in zip(learnt, weights, strict=True) if weight)
        return TrainingPrompt(text, tuple(taught), images)

    @functools.cached_property
    def _root(self) -> ImageRoot:
        root = UPath(self._folder, **self._options)
        shards = None if self._shards_folder is None else UPath(self._shards_folder, **self._options)
        return ImageRoot(root, root, shards)

    def _images(self, references: Sequence[str]) -> tuple[Image.Image, ...] | Rejection:
        decoded, budget = [], PixelBudget(DEFAULT_MAX_PIXELS)
        for place, reference in enumerate(references, start=1):
            inside = from_data_uri(reference)
            path = self._root.path_of(reference) if inside is None else ""
            if path is None:
                return Rejection(
                    RejectionReason.OUTSIDE_IMAGE_ROOT,
                    f"image {place}, {shorten(reference)}, is not below {self._folder}, and nothing outside "
                    "it is opened",
                )
            try:
                decoded.append(decode_image(self._root.read(path) if inside is None else inside))
                budget.spend(decoded[-1])
            except FileNotFoundError as error:
                return Rejection(RejectionReason.MISSING_IMAGE, f"image {place}: {error}")
            except PermissionError as error:
                return Rejection(RejectionReason.OUTSIDE_IMAGE_ROOT, f"image {place}: {error}")
            except (ImageTooLargeError, UndecodableImageError) as error:
                return Rejection(error.reason, f"image {place}: {error}")
        return tuple(decoded)


def _refuse_unread(fields: TrainedFields, text: str) -> Rejection | None:
    """Why a row would be trained on as something else than it says; None where it would not."""
    if fields.objects or GROUNDING_MARKS.search(text):
        found, remedy = "has boxes for placeholders in its text", "write the boxes into the text"
    elif fields.tools:
        found, remedy = "has tools, which the prompt would not show", "write them into the system text"
    elif fields.has_fractions:
        found, remedy = "learns an answer in part", "give each answer a weight of 0 or 1"
    else:
        return None
    return Rejection(RejectionReason.TEMPLATE_REFUSED, f"it {found}; {remedy}, or leave the row out")


def with_turn_ends(
    text: str, answers: Sequence[tuple[int, int]], tokenizer: Any
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The prompt and the spans that are learnt: each answer with the special token that ends its turn.

    If the template writes no such token after the last answer (LLaVA-1.5's does not), the tokenizer's EOS
    token replaces the white space there: a model that never sees an answer end would never end one.

    Args:
        text: The whole prompt that the template writes.
        answers: The [start, end) characters of the answers in the prompt.
        tokenizer: Tokenizer of the model.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    learnt = []
    for start, end in answers:
        turn_end = max((token for token in special if text.startswith(token, end)), key=len, default="")
        learnt.append((start, end + len(turn_end)))
    (start, end), ended = answers[-1], learnt[-1][1]
    if end == ended and tokenizer.eos_token and not text[end:].strip():
        text = text[:end] + tokenizer.eos_token
        learnt[-1] = (start, len(text))
    return text, tuple(learnt)


@dataclass(frozen=True, slots=True)
class Collator:
    """Turns prompts into one batch of tensors with labels, by the model's own processor.

    It works for every family that the selection is tested with, and for batches in which rows have several
    images or none.
    """

    processor: Any

    def __call__(self, prompts: Sequence[TrainingPrompt]) -> dict[str, Any]:
        """The batch: the model's input, and ``labels``, (rows, tokens), `IGNORED` outside the spans.

        Raises:
            ValueError: The processor refuses the text or the images.
            TypeError: The processor refuses them; tokenizers raise it for text that is no string.
        """
        bos = self.processor.tokenizer.bos_token
        outputs = dict(
            self.processor(
                text=[prompt.text for prompt in prompts],
                images=[list(prompt.images) for prompt in prompts]
                if any(prompt.images for prompt in prompts)
                else None,
                images_kwargs={"return_tensors": "pt"},
                # A template that writes the BOS token itself must not get a second one.
                add_special_tokens=not (bos and prompts[0].text.startswith(bos)),
                padding=True,
                padding_side="right",
                truncation=False,
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                verbose=False,
            )
        )
        # Where the processor replaced an image mark by the image's tokens; absent if no row has an image.
        replaced = outputs.pop("text_replacement_offsets", None) or [[]] * len(prompts)
        batch = {
            name: value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
            for name, value in outputs.items()
        }
        offsets = batch.pop("offset_mapping")
        learnt = torch.stack(
            [
                _tokens_of(row, prompt.learnt, marks)
                for row, prompt, marks in zip(offsets, prompts, replaced, strict=True)
            ]
        )
        return {**batch, "labels": batch["input_ids"].masked_fill(~learnt, IGNORED)}


def _tokens_of(
    offsets: torch.Tensor, spans: Sequence[tuple[int, int]], replaced: Sequence[dict[str, Any]]
) -> torch.Tensor:
    """Which tokens overlap the spans, (tokens,); ``offsets``, (tokens, 2), refer to the expanded text."""
    starts, ends = offsets.unbind(-1)
    found = torch.zeros(len(offsets), dtype=torch.bool)
    for begin, end in spans:
        if begin == end:
            continue
        gained = 0
        for mark in replaced:
            if mark["span"][1] <= begin:
                gained = mark["new_span"][1] - mark["span"][1]
        first, last = begin + gained, end + gained
        # A token of width 0 is white space that some tokenizers leave out of their offsets.
        found |= (starts < last) & (ends > first) | (starts == ends) & (first < starts) & (starts <= last)
    return found


class _Judged(Dataset[int | Rejection]):
    """The length in tokens of each row, or the reason why it cannot be trained on."""

    def __init__(self, rows: TrainingRows, collator: Collator, max_tokens: int) -> None:
        self._rows, self._collator, self._max_tokens = rows, collator, max_tokens

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> int | Rejection:
        prompt = self._rows.prompt(index)
        if isinstance(prompt, Rejection):
            return prompt
        try:
            batch = self._collator([prompt])
        except (ValueError, TypeError) as error:
            return Rejection(RejectionReason.PROCESSOR_REFUSED, f"the model's processor refuses it: {error}")
        if not (batch["labels"] != IGNORED).any():
            return Rejection(RejectionReason.MALFORMED_ROW, "its answers are empty; leave the row out")
        n_tokens = int(batch["input_ids"].shape[1])
        if n_tokens > self._max_tokens:
            return Rejection(
                RejectionReason.TOO_LONG,
                f"{n_tokens:,} tokens, at most {self._max_tokens:,} are trained on, and cutting would lose "
                "image tokens: shorten or split the conversation, or raise max_length, up to what the model "
                "takes",
            )
        return n_tokens


def judge(
    rows: TrainingRows, collator: Collator, max_tokens: int, workers: int = 0
) -> tuple[dict[int, int], list[LeftOut]]:
    """Prepare every row once, to find rows that cannot be trained on before the training starts.

    This takes as long as preparing an epoch without the model; ``workers`` processes share the work.

    Returns:
        The length in tokens of each row that can be trained on, by its position, and the rows that cannot.
    """
    usable, left_out = {}, []
    # Batches of one that are not collated, since lengths and reasons need not become tensors.
    loader = DataLoader(_Judged(rows, collator, max_tokens), num_workers=workers, collate_fn=_only)
    for index, found in enumerate(loader):
        if isinstance(found, Rejection):
            left_out.append(LeftOut(index, rows.source_id(index), found.reason.value, found.detail))
        else:
            usable[index] = int(found)
    return usable, left_out


def _only(batch: list[Any]) -> Any:
    (item,) = batch
    return item
