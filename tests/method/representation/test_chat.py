"""Where the answers stand in the prompt, for templates of several kinds."""

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from scalselect_assets.method.representation.chat import ChatTemplateError, render_chat
from scalselect_assets.method.representation.conversation import IMAGE, Conversation, Turn
from scalselect_assets.method.representation.step_limit import limited_template_steps

LLAVA = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{{ eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}"
)
TRIMMING = LLAVA.replace("c['text']", "c['text'] | trim")
SHOUTING = LLAVA.replace(
    "{{ c['text'] }}", "{{ c['text'] | upper if m['role'] == 'assistant' else c['text'] }}"
)
FORGETTING = LLAVA.replace("in messages %}", "in messages[2:] %}")
REFUSING = "{{ raise_exception('roles must alternate') }}"
COUNTING = LLAVA.replace(
    "{{ eos_token", "{{ m['content'][0]['text'] | length if m['role'] == 'assistant' }}{{ eos_token"
)


class TemplateProcessor:
    """The one method of a processor that rendering needs."""

    def __init__(self, template: str) -> None:
        self._template = template

    def apply_chat_template(self, messages: list[dict[str, Any]], *, tokenize: bool) -> str:
        assert not tokenize
        (text,), _ = render_jinja_template(
            conversations=[messages], chat_template=self._template, bos_token="<s>", eos_token="</s>"
        )
        return text


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Turn(role, (text,)) for role, text in turns))  # type: ignore[arg-type]


def answers(template: str, sample: Conversation) -> list[str]:
    chat = render_chat(TemplateProcessor(template), sample)
    return [chat.text[start:end] for start, end in chat.answer_spans]


def test_a_one_word_answer_is_found_where_it_stands_and_not_in_the_question() -> None:
    chat = render_chat(
        TemplateProcessor(LLAVA), conversation(("user", "Yes or no? A or B?"), ("assistant", "Yes"))
    )
    ((start, end),) = chat.answer_spans
    assert chat.text[:start].endswith("ASSISTANT: ")
    assert (chat.text[start:end], chat.text[end:]) == ("Yes", "</s>")


def test_every_answer_of_several_turns_is_found() -> None:
    sample = conversation(
        ("user", "A"), ("assistant", "A"), ("user", "ASSISTANT: A"), ("assistant", "A</s>USER")
    )
    assert answers(LLAVA, sample) == ["A", "A</s>USER"]


def test_images_keep_their_places_and_are_not_part_of_an_answer() -> None:
    sample = Conversation((Turn("user", ("left", IMAGE, "right")), Turn("assistant", ("Both",))))
    chat = render_chat(TemplateProcessor(LLAVA), sample)
    assert "USER: left<image>right ASSISTANT: Both</s>" in chat.text


def test_an_answer_that_the_template_trims_is_found_trimmed() -> None:
    assert answers(TRIMMING, conversation(("user", "q"), ("assistant", "  Yes \n"))) == ["Yes"]


def test_an_empty_answer_has_an_empty_span() -> None:
    assert answers(LLAVA, conversation(("user", "q"), ("assistant", ""))) == [""]


def test_private_use_characters_in_a_row_do_not_confuse_the_placeholders() -> None:
    assert answers(LLAVA, conversation(("user", "\ue0000\ue001"), ("assistant", "\ue000\ue0000\ue001"))) == [
        "\ue000\ue0000\ue001"
    ]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (SHOUTING, "alters the text of answer 1"),
        (FORGETTING, "leaves out an assistant turn"),
        (REFUSING, "roles must alternate"),
        (COUNTING, "alters the text of answer 1"),
    ],
)
def test_a_template_that_hides_where_the_answers_are_is_refused(template: str, message: str) -> None:
    sample = conversation(("user", "q"), ("assistant", "first"), ("user", "q"), ("assistant", "second one"))
    with pytest.raises(ChatTemplateError, match=message):
        render_chat(TemplateProcessor(template), sample)


def test_a_template_that_reaches_outside_its_sandbox_is_refused() -> None:
    with pytest.raises(ChatTemplateError):
        render_chat(
            TemplateProcessor("{{ messages.__class__.__mro__ }}"),
            conversation(("user", "q"), ("assistant", "a")),
        )


class Recording(TemplateProcessor):
    """Also keeps the texts that it is given."""

    def __init__(self, template: str) -> None:
        super().__init__(template)
        self.given: list[int] = []

    def apply_chat_template(self, messages: list[dict[str, Any]], *, tokenize: bool) -> str:
        self.given.append(sum(len(part["text"]) for turn in messages for part in turn["content"]))
        return super().apply_chat_template(messages, tokenize=tokenize)


def test_placeholders_are_short_whatever_private_characters_a_row_holds() -> None:
    hostile = "\ue000" * 200_000
    sample = conversation(*[("user", hostile), ("assistant", hostile)] * 3)
    processor = Recording(LLAVA)

    chat = render_chat(processor, sample)

    assert [chat.text[start:end] for start, end in chat.answer_spans] == [hostile] * 3
    with_answers, with_placeholders = processor.given
    assert (with_answers, len(processor.given)) == (6 * len(hostile), 2)
    assert with_placeholders - 3 * len(hostile) < 3 * 64


ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a loop over a list that it makes longer each time": (
        "{% set ns = namespace(x=[1]) %}{% for a in range(99999) %}{% for b in ns.x %}"
        "{% endfor %}{% set ns.x = ns.x + [1] %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_template_that_does_not_end_is_stopped_and_refused(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "scalselect_assets.method.representation.chat.limited_template_steps",
        lambda: limited_template_steps(20_000),
    )
    with pytest.raises(ChatTemplateError, match="takes more than 20,000 steps"):
        render_chat(TemplateProcessor(template + LLAVA), conversation(("user", "q"), ("assistant", "a")))
