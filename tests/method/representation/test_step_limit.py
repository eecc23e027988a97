"""A template is stopped at a number of steps or a processor time, and what it ran in goes on as before."""

import sys

import jinja2
import pytest

from scalselect_assets.method.representation.step_limit import (
    MAX_STEPS,
    TemplateStepsError,
    limited_template_steps,
    unbounded_operator,
)

LOOP = jinja2.Environment(autoescape=True).from_string("{% for i in range(n) %}x{% endfor %}")


def test_the_same_work_is_let_through_or_stopped_by_its_size_alone() -> None:
    with limited_template_steps(max_steps=2000):
        assert LOOP.render(n=100) == "x" * 100
    for _ in range(2):
        with (
            pytest.raises(TemplateStepsError, match="more than 2,000 steps"),
            limited_template_steps(max_steps=2000),
        ):
            LOOP.render(n=2000)


def test_a_conversation_of_thousands_of_turns_is_within_the_limit() -> None:
    with limited_template_steps():
        LOOP.render(n=10_000)
    assert MAX_STEPS >= 100 * 10_000


def test_slow_steps_are_stopped_by_their_processor_time() -> None:
    with (
        pytest.raises(TemplateStepsError, match="seconds of processor time"),
        limited_template_steps(max_seconds=0.0),
    ):
        LOOP.render(n=1000)


def test_whoever_traced_before_traces_again() -> None:
    def tracer(*_: object) -> None:
        return None

    before = sys.gettrace()
    try:
        sys.settrace(tracer)
        with pytest.raises(TemplateStepsError), limited_template_steps(max_steps=10):
            LOOP.render(n=100)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ 9 ** 9 ** 9 }}", "**"),
        ("{% if 2**n > 5 %}{% endif %}", "**"),
        ("**bold** {{ a * b }} {# 2 ** 3 #} {{ '**' }}", None),
    ],
)
def test_the_one_operator_that_no_limit_stops_is_found_in_expressions_only(
    template: str, found: str | None
) -> None:
    assert unbounded_operator(template) == found
