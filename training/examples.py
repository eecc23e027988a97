"""From a row of the training file to what the model learns from: tokens, pixels, and labels on answers only.

The prompt is what the model's own chat template writes. Few templates mark their answers for Transformers
(``{% generation %}``), so answers are found from the template's structure, as the selection finds them
(`method.representation.chat`), for every family alike; where a template does mark them, the labels agree
with its marks. Beyond an answer's content, one thing is learnt: the token that ends the turn, so that the
tuned model knows when to stop.
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
    ImageTooLargeError,
    UndecodableImageError,
    decode_image,
)
from scalselect_assets.method.representation.rejection import Rejection, RejectionReason
from scalselect_assets.resources.image_root import ImageRoot
from scalselect_assets.resources.samples import parse_row, shorten

IGNORED = -100
"""The label of a token that carries no loss, as PyTorch's cross entropy has it."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row, ready for the processor: its text, the spans of it that are learnt, its decoded images."""

    text: str
    learnt: tuple[tuple[int, int], ...]
    images: tuple[Image.Image, ...]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that is not trained on: its place in the training file from 0, its id, and why."""

    row: int
    source_id: str | None
    reason: str
    detail: str


class Rows(Dataset[Prompt]):
    """Rows of a training file as prompts, made when asked for. Picklable, for worker processes."""

    def __init__(
        self,
        texts: Sequence[str],
        processor: Any,
        images_folder: str,
        options: dict[str, str],
        image_place: EffectivePlace = "as_written",
    ) -> None:
        """Rows whose image references start from ``images_folder``.

        Args:
            texts: The rows' JSON texts.
            processor: The model's.
            images_folder: Local folder or URI; nothing outside it is opened.
            options: fsspec's storage options, for a folder that is not local.
            image_place: Where images stand in the prompts; that of the selection.
        """
        self._texts, self._processor, self._image_place = texts, processor, image_place
        self._folder, self._options = images_folder, options

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Prompt:
        """The prompt of a row.

        Raises:
            RuntimeError: It cannot be made; `judge` finds such rows before the training starts.
        """
        found = self.prompt(index)
        if isinstance(found, Rejection):
            raise RuntimeError(f"row {index} cannot be trained on any more: {found.reason}: {found.detail}")
        return found

    def source_id(self, index: int) -> str | None:
        """The row's own id."""
        return parse_row(self._texts[index], keep_text_only=True).source_id

    def prompt(self, index: int) -> Prompt | Rejection:
        """The prompt of a row, or why it has none.

        Raises:
            OSError: An image cannot be read for reasons other than that it is not there.
        """
        parsed = parse_row(self._texts[index], index, keep_text_only=True)
        if parsed.sample is None:
            return parsed.rejection or Rejection(RejectionReason.MALFORMED_ROW, "it is no row")
        images = self._images(parsed.sample.images)
        if isinstance(images, Rejection):
            return images
        try:
            chat = render_chat(self._processor, placed(parsed.sample.conversation, self._image_place))
        except ChatTemplateError as error:
            return Rejection(RejectionReason.TEMPLATE_REFUSED, str(error))
        return Prompt(*with_turn_ends(chat.text, chat.answer_spans, self._processor.tokenizer), images)

    @functools.cached_property
    def _root(self) -> ImageRoot:
        root = UPath(self._folder, **self._options)
        return ImageRoot(root, root)

    def _images(self, references: Sequence[str]) -> tuple[Image.Image, ...] | Rejection:
        decoded = []
        for place, reference in enumerate(references, start=1):
            path = self._root.path_of(reference)
            if path is None:
                return Rejection(
                    RejectionReason.OUTSIDE_IMAGE_ROOT,
                    f"image {place}, {shorten(reference)}, is not below {self._folder}, and nothing outside "
                    "it is opened",
                )
            try:
                decoded.append(decode_image(self._root.read(path)))
            except FileNotFoundError as error:
                return Rejection(RejectionReason.MISSING_IMAGE, f"image {place}: {error}")
            except PermissionError as error:
                return Rejection(RejectionReason.OUTSIDE_IMAGE_ROOT, f"image {place}: {error}")
            except ImageTooLargeError as error:
                return Rejection(RejectionReason.IMAGE_TOO_LARGE, f"image {place}: {error}")
            except UndecodableImageError as error:
                return Rejection(RejectionReason.UNDECODABLE_IMAGE, f"image {place}: {error}")
        return tuple(decoded)


def with_turn_ends(
    text: str, answers: Sequence[tuple[int, int]], tokenizer: Any
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The prompt and the spans that are learnt: each answer with the special token that ends its turn.

    Where the template writes none after the last answer (LLaVA-1.5's does not), the tokenizer's EOS token
    takes the place of the white space there: a model that never sees an answer end would never end one.

    Args:
        text: The whole prompt, as the template writes it.
        answers: The [start, end) characters of the answers in it.
        tokenizer: Of the model.
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
    """Prompts to one batch of tensors, by the model's own processor, with labels.

    Works for every family that the selection is tested with, also for batches in which rows have several
    images, or none.
    """

    processor: Any

    def __call__(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The batch: what the model takes, and ``labels``, (rows, tokens), `IGNORED` where nothing is learnt.

        Raises:
            ValueError: The processor refuses the text or the images.
            TypeError: Likewise; so do tokenizers complain about text that is no text.
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
        # Where the processor put the tokens of an image in the place of its mark; none where no row has one.
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
    """Which tokens carry a part of the spans, (tokens,); ``offsets``, (tokens, 2), count after expansion."""
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
        # A token without width is white space that some tokenizers leave out of their offsets.
        found |= (starts < last) & (ends > first) | (starts == ends) & (first < starts) & (starts <= last)
    return found


class _Judged(Dataset[int | Rejection]):
    """The length in tokens of each row, or why it cannot be trained on."""

    def __init__(self, rows: Rows, collator: Collator, max_tokens: int) -> None:
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
    rows: Rows, collator: Collator, max_tokens: int, workers: int = 0
) -> tuple[dict[int, int], list[LeftOut]]:
    """Prepare every row once, so that what cannot be trained on is known before the training starts.

    Costs what preparing an epoch costs, without the model; ``workers`` processes share it.

    Returns:
        The length in tokens of the rows that can be trained on, by their place, and the rows that cannot.
    """
    usable, left_out = {}, []
    # Batches of one, taken as they are: lengths and reasons need not become tensors.
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
