"""The representation by the rules of the authors' published code, each of which can be replaced by ours.

Written from reading github.com/ChangtiWu/ScalSelect at 74375d3, in this project's own words; it runs the
whole model with eager attention, as the published code does. With every rule replaced it is the definition
that `tests.method.zoo.Reference` computes, so that each rule can be tried by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from scalselect_assets.method.representation.conversation import IMAGE, Conversation, Turn
from tests.method.zoo import Reference


@dataclass(frozen=True, slots=True)
class Rules:
    """Which of the published rules are in force; the others are ours.

    Attributes:
        markers_are_vision: Qwen's ``<|vision_start|>`` and ``<|vision_end|>`` count as vision tokens.
        images_lead: All images go to the front of the first user turn, and only its text loses its marks.
        answers_are_searched: An answer is where its tokens, alone, first occur after the one before.
        cut_at: Tokens after which the sample is cut off.
        dtype: Of weights and activations.
    """

    markers_are_vision: bool = False
    images_lead: bool = False
    answers_are_searched: bool = False
    cut_at: int | None = None
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True, eq=False)
class Published:
    """The vector of one sample and the token sets that it was made from."""

    vector: NDArray[np.float32]
    vision: NDArray[np.bool_]
    answer: NDArray[np.bool_]


@torch.inference_mode()
def represent(
    reference: Reference, conversation: Conversation, images: Sequence[Image.Image], rules: Rules
) -> Published:
    """The representation of one sample by ``rules``."""
    if rules.images_lead:
        conversation = images_leading(conversation)
    inputs = reference.inputs(conversation, images)
    offsets = inputs.pop("offset_mapping")[0]
    if rules.cut_at is not None:
        inputs = {
            name: value[:, : rules.cut_at] if value.shape[:2] == (1, len(offsets)) else value
            for name, value in inputs.items()
        }
        offsets = offsets[: rules.cut_at]
    ids = inputs["input_ids"][0]
    vision = _vision(reference, ids, with_markers=rules.markers_are_vision)
    if rules.answers_are_searched:
        answer = _searched(reference, ids, conversation)
    else:
        answer = _located(reference, offsets, conversation)
    model = reference.model.to(rules.dtype)
    try:
        output = model(
            **{
                name: value.to(rules.dtype) if value.is_floating_point() else value
                for name, value in inputs.items()
            },
            output_hidden_states=True,
            output_attentions=True,
            use_cache=False,
        )
    finally:
        reference.model.to(torch.float32)
    received = output.attentions[0][0].mean(0).float()[~vision & ~answer][:, vision].mean(0)
    share = received / received.sum()
    order = share.sort(descending=True).indices
    kept = order[: int((share[order].cumsum(0) <= 0.9).sum()) + 1]
    vector = output.hidden_states[1][0].float()[vision][kept].mean(0)
    return Published(vector.numpy(), vision.numpy(), answer.numpy())


def images_leading(conversation: Conversation) -> Conversation:
    """All images in front of the first user turn; marks of later turns stay there as text."""
    first = next(place for place, turn in enumerate(conversation.turns) if turn.role == "user")
    turns = []
    for place, turn in enumerate(conversation.turns):
        text = "".join("" if part is IMAGE and place == first else _as_text(part) for part in turn.parts)
        images = (IMAGE,) * conversation.n_images if place == first else ()
        turns.append(Turn(turn.role, (*images, text)))
    return Conversation(tuple(turns))


def _as_text(part: Any) -> str:
    return str(IMAGE.value) if part is IMAGE else str(part)


def _vision(reference: Reference, ids: torch.Tensor, *, with_markers: bool) -> torch.Tensor:
    config = reference.model.config
    found = ids == config.image_token_id
    if with_markers:
        found |= (ids == config.vision_start_token_id) | (ids == config.vision_end_token_id)
    return found


def _located(reference: Reference, offsets: torch.Tensor, conversation: Conversation) -> torch.Tensor:
    starts, ends = offsets.unbind(-1)
    found = torch.zeros(len(offsets), dtype=torch.bool)
    for begin, end in reference._answer_spans(conversation):
        found |= (starts < end) & (ends > begin)
    return found


def _searched(reference: Reference, ids: torch.Tensor, conversation: Conversation) -> torch.Tensor:
    tokens, found, after = ids.tolist(), torch.zeros_like(ids, dtype=torch.bool), 0
    for answer in conversation.texts("assistant"):
        wanted = reference.processor.tokenizer(answer.strip(), add_special_tokens=False)["input_ids"]
        places = range(after, len(tokens) - len(wanted) + 1)
        place = next((place for place in places if tokens[place : place + len(wanted)] == wanted), None)
        if place is not None:
            after = place + len(wanted)
            found[place:after] = True
    return found
