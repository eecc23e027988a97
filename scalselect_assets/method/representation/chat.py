"""The conversation rendered by the target model's own chat template, with the places of its answers.

An instruction token is every non-vision token that is not content of an assistant turn: questions, system
text, role words, separators and special tokens all count. The content of the assistant turns is found from
the template's structure: the template is rendered once with a unique placeholder in each answer, which gives
the text around the answers, and once with the answers themselves. The words of an
answer are never searched for, so an answer ``Yes`` that also occurs in the question causes no mistake.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import jinja2

from scalselect_assets.method.representation.conversation import IMAGE, Conversation
from scalselect_assets.method.representation.step_limit import TemplateStepsError, limited_template_steps

# Private-use code points delimit the placeholders.
_OPEN, _CLOSE = "\ue000", "\ue001"


class ChatTemplateError(ValueError):
    """The model's chat template cannot express this conversation, or alters its answers beyond trimming."""


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """The prompt text (one image token per image) and the [start, end) characters of the answers in it."""

    text: str
    answer_spans: tuple[tuple[int, int], ...]


def render_chat(processor: Any, conversation: Conversation) -> RenderedChat:
    """Render ``conversation`` with the chat template of ``processor``.

    Args:
        processor: A Transformers processor with a chat template.
        conversation: The whole sample, answers included.

    Raises:
        ChatTemplateError: The template raises (unknown roles, or roles that do not alternate), or changes an
            answer by more than trimming its outer whitespace.
    """
    answers = list(conversation.texts("assistant"))
    text = _render(processor, conversation, answers)
    fixed = _text_around_answers(processor, conversation, len(answers), avoid=text)
    return RenderedChat(text, _answer_spans(text, fixed, answers))


def _text_around_answers(processor: Any, conversation: Conversation, n: int, avoid: str) -> list[str]:
    """The ``n + 1`` pieces of prompt text before, between and after the answers."""
    # The digits of a hash of the text are short for every row, and no row can contain its own hash.
    number = int.from_bytes(hashlib.sha256(avoid.encode(errors="surrogatepass")).digest()[:16])
    placeholders = [f"{_OPEN}{number}.{index}{_CLOSE}" for index in range(n)]
    text, pieces, position = _render(processor, conversation, placeholders), [], 0
    for placeholder in placeholders:
        found = text.find(placeholder, position)
        if found < 0:
            raise ChatTemplateError("the chat template leaves out an assistant turn of this conversation")
        pieces.append(text[position:found])
        position = found + len(placeholder)
    return [*pieces, text[position:]]


def _answer_spans(text: str, fixed: list[str], answers: list[str]) -> tuple[tuple[int, int], ...]:
    """Align the real prompt with the text around the answers."""
    spans, position = [], len(fixed[0])
    if not text.startswith(fixed[0]):
        raise ChatTemplateError("the chat template's text before the first answer depends on the answer")
    for index, (answer, following) in enumerate(zip(answers, fixed[1:], strict=True)):
        for written in (answer, answer.strip()):
            if text.startswith(written + following, position):
                spans.append((position, position + len(written)))
                position += len(written) + len(following)
                break
        else:
            raise ChatTemplateError(
                f"the chat template alters the text of answer {index + 1} beyond trimming it, so its tokens "
                "cannot be distinguished from the instruction's"
            )
    if position != len(text):
        raise ChatTemplateError("the chat template's text after the last answer depends on the answer")
    return tuple(spans)


def _render(processor: Any, conversation: Conversation, answers: list[str]) -> str:
    """The prompt with ``answers`` in the place of the assistant's text pieces."""
    remaining = iter(answers)
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "image"}
                if part is IMAGE
                else {"type": "text", "text": next(remaining) if turn.role == "assistant" else part}
                for part in turn.parts
            ],
        }
        for turn in conversation.turns
    ]
    try:
        with limited_template_steps():
            return str(processor.apply_chat_template(messages, tokenize=False))
    except TemplateStepsError as error:
        raise ChatTemplateError(str(error)) from error
    # A template is a program. If it expects another form of content, it fails with Python's own errors.
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        raise ChatTemplateError(f"the chat template refuses this conversation: {error}") from error
