"""Texts are alike where they share what is rare in the pool, questions and answers each."""

import numpy as np
import pytest

from scalselect_assets.method.choice.text_likeness import Shingles, TextLikeness, shingles

POOL = [f"what colour is the {shape}" for shape in ("circle", "square", "ring", "cross", "star", "moon")]


def likeness(*texts: str, pool: list[str] = POOL) -> float:
    """The likeness of the first two texts in a pool that holds others."""
    compared = Shingles.of([shingles(text.split()) for text in (*texts, *pool)])
    return float(compared.likeness(np.array([0]), np.array([1]))[0])


def test_equal_texts_are_alike_and_texts_without_a_common_word_are_not() -> None:
    assert likeness(POOL[0], POOL[0]) == 1.0
    assert likeness("what colour is it", "nothing of that") == 0.0
    assert likeness("", "") == 1.0
    assert likeness("", POOL[0]) == 0.0


def test_a_common_wording_does_not_make_two_questions_alike() -> None:
    assert likeness(POOL[0], POOL[1]) < 0.3


def test_words_that_one_text_adds_do_not_part_it_from_the_other() -> None:
    assert likeness(POOL[0], f"{POOL[0]} really") == 1.0
    assert likeness(f"{POOL[0]} really", POOL[0]) == 1.0


def test_a_question_inside_a_long_conversation_is_not_its_copy() -> None:
    long = " ".join(f"{POOL[0]} and {i} tell{i} more{i}" for i in range(20))
    assert likeness(POOL[0], long) < 0.5


def test_the_same_words_in_another_order_are_less_alike() -> None:
    first, second = "is the red cup left of the blue box", "is the blue cup left of the red box"
    assert likeness(first, second, pool=[*POOL, "is the red box left of the blue cup"]) < 0.9


def test_the_lower_of_question_and_answer_counts() -> None:
    asked = Shingles.of([shingles(text.split()) for text in (POOL[0], POOL[0], POOL[1])])
    answered = Shingles.of([shingles([text]) for text in ("red", "blue", "red")])
    compared = TextLikeness(asked, answered)
    first, second = np.array([0, 0, 0]), np.array([0, 1, 2])
    assert compared(first, second).tolist() == [1.0, 0.0, pytest.approx(asked.likeness(first, second)[2])]


def test_long_texts_are_compared_by_a_sample_that_equal_texts_share() -> None:
    words = [f"w{i}" for i in range(2000)]
    assert len(shingles(words)) == 256
    texts = Shingles.of([shingles(words), shingles(words), shingles([f"v{i}" for i in range(2000)])])
    assert texts.likeness(np.array([0, 0]), np.array([1, 2])).tolist() == [1.0, 0.0]


def test_many_pairs_at_once_give_what_each_gives_alone() -> None:
    rng = np.random.default_rng(0)
    texts = Shingles.of([shingles([f"w{i}" for i in rng.integers(0, 30, 8)]) for _ in range(60)])
    first, second = rng.integers(0, 60, (2, 5000))
    together = texts.likeness(first, second)
    for pair in range(0, 5000, 500):
        alone = texts.likeness(first[pair : pair + 1], second[pair : pair + 1])
        assert together[pair] == alone[0]
    assert np.array_equal(together, texts.likeness(second, first))
