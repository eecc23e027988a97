"""A limit on the work of a chat template, which is a program that comes with a model and may never end.

Python's sandbox for templates limits what a template can access, but not how long it runs. This module
counts its steps: one for each line that it executes and each function that it calls. The count is the same on
every machine. A limit on the thread's processor time covers slow single steps. Counting costs about half a
microsecond per step.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jinja2

MAX_STEPS = 2_000_000
"""A template takes about a million steps for a conversation of 10,000 turns."""

MAX_SECONDS = 60.0
"""The limit on one rendering's processor time. An ordinary conversation takes a fraction of a millisecond."""

_TEMPLATE_FILE = "<template>"  # Jinja's name for the code of a template that comes from a string
_STEPS_PER_LOOK = 64  # the clock is read once in so many steps


class TemplateStepsError(RuntimeError):
    """A template was stopped because it takes more steps or more time than any real template needs."""


@contextmanager
def limited_template_steps(max_steps: int = MAX_STEPS, max_seconds: float = MAX_SECONDS) -> Iterator[None]:
    """Stop a template that this thread renders within the block if it exceeds a limit.

    Raises:
        TemplateStepsError: The template was stopped.
    """
    steps, started = 0, time.thread_time()

    def count(frame: FrameType, _event: str, _value: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > max_steps:
            raise TemplateStepsError(
                f"the chat template takes more than {max_steps:,} steps for this conversation; correct the "
                "template, or shorten the conversation"
            )
        if steps % _STEPS_PER_LOOK == 0 and time.thread_time() - started > max_seconds:
            raise TemplateStepsError(
                f"the chat template takes more than {max_seconds:g} seconds of processor time for this "
                "conversation; correct the template, or shorten the conversation"
            )
        return count if frame.f_code.co_filename == _TEMPLATE_FILE else None

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def unbounded_operator(template: str) -> str | None:
    """The operator of a template that no limit can stop, if it has one.

    ``9 ** 9 ** 9`` is a single step that takes hours. No template that writes a conversation
    needs to raise numbers to a power.

    Raises:
        jinja2.TemplateSyntaxError: The text is no valid template.
    """
    tokens = jinja2.Environment(autoescape=False).lex(template)  # noqa: S701 - nothing is rendered with it
    return next((value for _, kind, value in tokens if kind == "operator" and value == "**"), None)
