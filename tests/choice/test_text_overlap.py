"""The words of a text, and that no text makes them slow."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalselect_assets.choice import text_overlap
from scalselect_assets.choice.text_overlap import words

LOW, HIGH, KANA = "\u0323", "\u0301", "\uff9e"  # marks below, above, and one that is a letter by its category


class LongestRun:
    """Stands in for `unicodedata` and notes the longest run of marks that it is asked to put in order."""

    longest = 0

    @classmethod
    def normalize(cls, form: str, text: str) -> str:
        run = 0
        for character in text:
            is_mark = unicodedata.combining(unicodedata.normalize("NFKD", character)[0]) > 0
            run = run + 1 if is_mark else 0
            cls.longest = max(cls.longest, run)
        return unicodedata.normalize(form, text)


@pytest.mark.parametrize(
    "text", ["a" + HIGH * 500 + LOW * 500, (HIGH * 29 + KANA) * 40, KANA * 900, "\u0344" * 300 + LOW * 300]
)
def test_no_text_has_normalising_put_long_runs_of_marks_in_order(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_overlap, "unicodedata", LongestRun)
    monkeypatch.setattr(LongestRun, "longest", 0)
    words(text)
    assert LongestRun.longest <= 30


@given(st.text(st.sampled_from("aé한ก" + LOW + HIGH), max_size=40))
def test_texts_are_the_same_words_in_any_normal_form(text: str) -> None:
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    short = all(mark * 8 not in form for form in forms for mark in (LOW, HIGH))
    if short:
        assert words(forms[0]) == words(forms[1])
