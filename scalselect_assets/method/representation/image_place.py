"""Where a row's images stand in the prompt: in front of its first user turn, or where its marks are written.

A causal model lets a token attend to what stands before it only. A question that stands before its image
therefore attends to none of the image's tokens, and its vector says nothing of the question. The published
code moves all images to the front of the first user turn, and so does the setting ``first``.
"""

from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

from scalselect_assets.method.representation.chat import ChatTemplateError, render_chat
from scalselect_assets.method.representation.conversation import IMAGE, Conversation, Part, Turn

ImagePlace: TypeAlias = Literal["first", "as_written"]
"""What a selection declares."""

EffectivePlace: TypeAlias = Literal["first", "as_written", "by_template"]
"""What decides for a model: the declared place, or a chat template that puts a turn's images first itself."""

DEFAULT_IMAGE_PLACE: ImagePlace = "first"


def effective_place(processor: Any, place: ImagePlace) -> EffectivePlace:
    """The place that images have in the prompts of a model.

    Args:
        processor: A Transformers processor with a chat template.
        place: What is declared; it has no effect where the template writes a turn's images first.
    """
    question = "What is in the image?"
    try:
        prompts = {
            render_chat(
                processor, Conversation((Turn("user", parts), Turn("assistant", ("A pattern.",))))
            ).text
            for parts in ((IMAGE, question), (question, IMAGE))
        }
    except ChatTemplateError:
        return place  # the self-check at load says what the template refuses
    return "by_template" if len(prompts) == 1 else place


def placed(conversation: Conversation, place: EffectivePlace) -> Conversation:
    """The conversation with its images at ``place``.

    With ``first``, a row whose marks all stand in its first user turn gets them in front of that turn's text,
    whose pieces are joined by line breaks. A row with a mark in any other turn is interleaved on purpose: it
    stays as it is written, and so does every row with another place. The order of the images never changes.
    """
    if place != "first":
        return conversation
    first = next((number for number, turn in enumerate(conversation.turns) if turn.role == "user"), None)
    if first is None:
        return conversation
    turn = conversation.turns[first]
    marks = tuple(part for part in turn.parts if part is IMAGE)
    if not marks or len(marks) != conversation.n_images:
        return conversation
    text = "\n".join(part for part in turn.parts if isinstance(part, str))
    moved = Turn(turn.role, (*marks, text) if text else marks)
    return Conversation((*conversation.turns[:first], moved, *conversation.turns[first + 1 :]))


def asks_before_its_image(conversation: Conversation, place: EffectivePlace) -> bool:
    """Whether a question of the row stands wholly before its image in the prompt.

    That is: no text of the user follows the row's last image, so that nothing of the row's own words can
    attend to that image. Only words of the chat template and of answers can.

    Args:
        conversation: The row as it is written.
        place: Where the model's prompts have the images.
    """
    asked_since = True
    for role, part in _in_prompt_order(placed(conversation, place), place):
        if part is IMAGE:
            asked_since = False
        elif role == "user" and part.strip():
            asked_since = True
    return not asked_since


def _in_prompt_order(conversation: Conversation, place: EffectivePlace) -> Iterator[tuple[str, Part]]:
    """Role and part of everything in the prompt, in its order."""
    for turn in conversation.turns:
        parts = turn.parts
        if place == "by_template":
            parts = tuple(sorted(parts, key=lambda part: part is not IMAGE))
        yield from ((turn.role, part) for part in parts)
