"""Where images stand in a prompt: a row says the same wherever its mark is, unless asked otherwise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalselect_assets.method.representation.conversation import IMAGE, Conversation
from scalselect_assets.method.representation.encoder import VlmEncoder
from scalselect_assets.method.representation.image_place import (
    EffectivePlace,
    asks_before_its_image,
    effective_place,
    placed,
)
from scalselect_assets.method.representation.loading import load_encoder
from scalselect_assets.method.subspace.basis import fit_subspace
from scalselect_assets.method.subspace.leverage import leverage_scores
from scalselect_assets.method.subspace.moments import Moments
from scalselect_assets.method.subspace.rank import EnergyThreshold
from tests.method import zoo
from tests.method.samples import chat, conversation, pixels, represent
from tests.method.zoo import Reference

pytestmark = pytest.mark.usefixtures("one_torch_thread")

BY_TEMPLATE = ["llava", "llava_next", "llava_onevision"]
IN_PLACE = [family for family in zoo.FAMILIES if family not in {*BY_TEMPLATE, "paligemma"}]


def row(*parts: Any) -> Conversation:
    return conversation(("user", parts), ("assistant", ("A",)))


# What moves


@pytest.mark.parametrize(
    ("written", "moved"),
    [
        ((IMAGE, "Why?"), (IMAGE, "Why?")),
        (("Why?", IMAGE), (IMAGE, "Why?")),
        (("a", IMAGE, "b"), (IMAGE, "a\nb")),
        (("a", IMAGE, "b", IMAGE, IMAGE, "c"), (IMAGE, IMAGE, IMAGE, "a\nb\nc")),
        ((IMAGE,), (IMAGE,)),
        (("no image",), ("no image",)),
    ],
)
def test_the_marks_of_the_first_user_turn_go_before_its_text(written: Any, moved: Any) -> None:
    assert placed(row(*written), "first") == row(*moved)
    assert placed(row(*written), "as_written") == row(*written)
    assert placed(row(*written), "by_template") == row(*written)


def test_a_system_text_stays_before_the_images() -> None:
    written = conversation(("system", ("Be brief.",)), ("user", ("Why?", IMAGE)), ("assistant", ("A",)))
    assert placed(written, "first") == conversation(
        ("system", ("Be brief.",)), ("user", (IMAGE, "Why?")), ("assistant", ("A",))
    )


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_row_with_a_mark_in_another_turn_stays_as_it_is_written(role: str) -> None:
    later = (role, ("text", IMAGE))
    first = ("user", ("Which?", IMAGE))
    turns = [later, first] if role == "system" else [first, ("assistant", ("A",)), later]
    written = conversation(*turns, ("assistant", ("B",)))
    assert placed(written, "first") == written


def test_a_conversation_without_a_user_stays() -> None:
    written = conversation(("system", ("Describe.", IMAGE)), ("assistant", ("A",)))
    assert placed(written, "first") == written


# Which questions stand before their image


@pytest.mark.parametrize(
    ("turns", "first", "as_written", "by_template"),
    [
        ([("user", (IMAGE, "Why?"))], False, False, False),
        ([("user", ("Why?", IMAGE))], False, True, False),
        ([("user", ("Look:", IMAGE, "Why?"))], False, False, False),
        ([("user", ("Which?", IMAGE, "or", IMAGE))], False, True, False),
        # The later turn asks about the image, too.
        ([("user", ("Why?", IMAGE)), ("assistant", ("A",)), ("user", ("And?",))], False, False, False),
        # Interleaved, so that it stays as it is written.
        ([("user", ("Hello",)), ("assistant", ("A",)), ("user", ("Why?", IMAGE))], True, True, False),
        ([("user", ("Hello",)), ("assistant", ("A",)), ("user", (IMAGE, "Why?"))], False, False, False),
        ([("user", (IMAGE, "A?")), ("assistant", ("A",)), ("user", ("B?", IMAGE))], True, True, False),
        # A system text always stands before the image, an answer is no question.
        ([("system", ("Describe.",)), ("user", (IMAGE,))], True, True, True),
        ([("user", ("no image",))], False, False, False),
    ],
)
def test_a_question_stands_before_its_image_where_no_text_of_the_user_follows(
    turns: Any, first: bool, as_written: bool, by_template: bool
) -> None:
    asked = conversation(*turns, ("assistant", ("B",)))
    expected: dict[EffectivePlace, bool] = {
        "first": first,
        "as_written": as_written,
        "by_template": by_template,
    }
    assert {place: asks_before_its_image(asked, place) for place in expected} == expected


# What it does to the vectors of each family


@pytest.fixture
def as_written(tiny_vlm: Callable[[str], Path]) -> Callable[[str], VlmEncoder]:
    return lambda family: load_encoder(str(tiny_vlm(family)), device="cpu", image_place="as_written")


LATE = chat(("user", ("What is it?", IMAGE)), ("assistant", ("A square.",)), images=("1:90x60",))
EARLY = chat(("user", (IMAGE, "What is it?")), ("assistant", ("A square.",)), images=("1:90x60",))
BETWEEN = chat(("user", ("Look at", IMAGE, "now.")), ("assistant", ("A",)), images=("2:70x70",))


@pytest.mark.parametrize("family", IN_PLACE)
def test_by_default_the_place_of_the_mark_does_not_matter(
    family: str, tiny_encoder: Callable[[str], VlmEncoder], as_written: Callable[[str], VlmEncoder]
) -> None:
    late, early = represent(tiny_encoder(family), [LATE, EARLY])
    np.testing.assert_allclose(late.vector, early.vector, atol=1e-5, rtol=0)
    # Left where it is written it does, or this test would say nothing.
    late, early = represent(as_written(family), [LATE, EARLY])
    assert abs(late.vector - early.vector).max() > 0.1


@pytest.mark.parametrize("family", IN_PLACE)
@pytest.mark.parametrize("place", ["first", "as_written"])
def test_either_place_equals_the_whole_model_on_the_prompt_that_it_means(
    place: Any,
    family: str,
    tiny_encoder: Callable[[str], VlmEncoder],
    as_written: Callable[[str], VlmEncoder],
    tiny_vlm: Callable[[str], Path],
) -> None:
    encoder = tiny_encoder(family) if place == "first" else as_written(family)
    assert encoder.card.image_place == place
    whole = Reference(tiny_vlm(family))
    for sample in (LATE, BETWEEN):
        (got,) = represent(encoder, [sample])
        expected = whole.represent(
            placed(sample.conversation, place), [pixels(image) for image in sample.images]
        )
        assert got.n_instruction_tokens == expected.n_instruction_tokens
        np.testing.assert_allclose(got.vector, expected.vector, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", BY_TEMPLATE)
def test_where_the_template_puts_images_first_the_setting_changes_nothing(
    family: str, tiny_encoder: Callable[[str], VlmEncoder], as_written: Callable[[str], VlmEncoder]
) -> None:
    first, written = tiny_encoder(family), as_written(family)
    assert first.card.image_place == written.card.image_place == "by_template"
    assert first.card.fingerprint == written.card.fingerprint
    for sample in (LATE, BETWEEN):
        np.testing.assert_array_equal(
            represent(first, [sample])[0].vector, represent(written, [sample])[0].vector
        )


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl"])
def test_elsewhere_it_is_part_of_the_fingerprint(
    family: str, tiny_encoder: Callable[[str], VlmEncoder], as_written: Callable[[str], VlmEncoder]
) -> None:
    assert tiny_encoder(family).card.fingerprint != as_written(family).card.fingerprint


def test_a_template_that_refuses_the_question_leaves_the_place_as_declared() -> None:
    class Refusing:
        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            raise ValueError("never")

    assert effective_place(Refusing(), "first") == "first"
    assert effective_place(Refusing(), "as_written") == "as_written"


def test_the_same_rows_are_chosen_wherever_their_marks_are_written(
    tiny_encoder: Callable[[str], VlmEncoder], as_written: Callable[[str], VlmEncoder]
) -> None:
    def chosen(encoder: VlmEncoder, *, late: bool) -> set[int]:
        samples = []
        for number in range(50):
            text = f"Is it {number % 7} or {number % 5}?"
            parts = (text, IMAGE) if late else (IMAGE, text)
            reference = f"{number}:{30 + number}x40"
            samples.append(chat(("user", parts), ("assistant", ("Yes",)), images=(reference,)))
        x = np.stack([item.vector for item in represent(encoder, samples)])
        scores = leverage_scores(x, fit_subspace(Moments.of(x), EnergyThreshold(0.9)))
        return set(np.argsort(-scores)[:8].tolist())

    first, written = tiny_encoder("qwen2_vl"), as_written("qwen2_vl")
    assert chosen(first, late=True) == chosen(first, late=False) == chosen(written, late=False)
    assert chosen(written, late=True) != chosen(written, late=False)
