"""The place of a row's images in the prompt: before its first user turn, or where its marks are written.

In a causal model, a token attends only to the tokens before it. A question before its image therefore attends
to none of the image's tokens, and the sample's vector does not depend on the question. The published
code moves all images to the front of the first user turn, and so does the setting ``first``.
"""

from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

from scalselect_assets.method.representation.chat import ChatTemplateError, render_chat
from scalselect_assets.method.representation.conversation import IMAGE, Conversation, Part, Turn

ImagePlace: TypeAlias = Literal["first", "as_written"]
"""The place that a selection declares."""

EffectivePlace: TypeAlias = Literal["first", "as_written", "by_template"]
"""The place in a model's prompts: the declared one, or ``by_template`` if the template puts images first."""

DEFAULT_IMAGE_PLACE: ImagePlace = "first"


def effective_place(processor: Any, place: ImagePlace) -> EffectivePlace:
    """The place that images have in the prompts of a model.

    Args:
        processor: A Transformers processor with a chat template.
        place: The declared place. It has no effect if the template itself writes a turn's images first.
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
        return place  # the self-check at load reports what the template refuses
    return "by_template" if len(prompts) == 1 else place


def placed(conversation: Conversation, place: EffectivePlace) -> Conversation:
    """The conversation with its images at ``place``.

    With ``first``, a row whose marks all stand in its first user turn gets them in front of that turn's text,
    whose pieces are joined by line breaks. A row with a mark in any other turn is interleaved on purpose and
    stays as it is written. With another place, every row stays as it is written.
    The order of the images never changes.
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

    This is so if no text of the user follows the row's last image, so that nothing of the row's own words can
    attend to that image. Only words of the chat template and of answers can.

    Args:
        conversation: The row as it is written.
        place: The place of images in the model's prompts.
    """
    asked_since = True
    for role, part in _in_prompt_order(placed(conversation, place), place):
        if part is IMAGE:
            asked_since = False
        elif role == "user" and part.strip():
            asked_since = True
    return not asked_since


def _in_prompt_order(conversation: Conversation, place: EffectivePlace) -> Iterator[tuple[str, Part]]:
    """The role and part of every piece of the prompt, in prompt order."""
    for turn in conversation.turns:
        parts = turn.parts
        if place == "by_template":
            parts = tuple(sorted(parts, key=lambda part: part is not IMAGE))
        yield from ((turn.role, part) for part in parts)
