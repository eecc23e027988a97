"""Any shard key becomes a name that every file system and LanceDB take, and no two keys share one."""

import re

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from scalselect_assets.resources.names import decode_name, encode_name

LEGAL = re.compile(r"[A-Za-z0-9_.-]+")
LONGEST = 180
KEYS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("a_/.%\n'\"5f한"), min_size=1)


def full_length(key: str) -> int:
    """Of the name, were it not cut."""
    return sum(1 if re.match("[A-Za-z0-9-]", letter) else 3 * len(letter.encode()) for letter in key)


@given(KEYS)
@settings(deadline=None)
@example("_")
@example("a_2fb")
@example("..")
@example("한국/부분 1.jsonl")
@example("x" * LONGEST)
@example("/" * 60)
def test_a_key_comes_back_from_its_name(key: str) -> None:
    assume(full_length(key) <= LONGEST)

    assert decode_name(encode_name(key)) == key


@given(KEYS | st.text(st.characters(exclude_categories=["Cs"]), min_size=100, max_size=400))
@settings(deadline=None)
@example("/" * 60)
@example("/" * 61)
@example("x" * (LONGEST + 1))
@example("한" * 1000)
def test_a_name_is_legal_everywhere_and_never_too_long(key: str) -> None:
    name = encode_name(key)

    assert LEGAL.fullmatch(name)
    assert name not in {".", ".."}
    assert len(name) <= LONGEST


@given(st.lists(KEYS, unique=True))
@settings(deadline=None)
@example(["a/b", "a_2fb", "a__2fb", "a_b", "a b", "a%2fb"])
@example(["é", "e\u0301"])
def test_different_keys_have_different_names(keys: list[str]) -> None:
    assert len({encode_name(key) for key in keys}) == len(keys)


def test_long_keys_that_begin_alike_have_different_names() -> None:
    beginnings = ["x" * 300, "/" * 100, "한" * 200, "x" * (LONGEST - 1)]
    keys = [f"{beginning}{ending}" for beginning in beginnings for ending in ("", "0", "1", "/", "x", "한")]
    lengths = [f"{'y' * length}" for length in range(LONGEST - 40, LONGEST + 40)]

    assert len({encode_name(key) for key in keys + lengths}) == len(keys + lengths)


def test_a_full_name_is_never_that_of_a_cut_one() -> None:
    cut = encode_name("x" * 300)

    assert encode_name(cut) != cut
    assert "__" in cut
    assert "__" not in encode_name("a__b_")


@given(KEYS)
@settings(deadline=None)
@example("Part-A.jsonl")
def test_keys_that_differ_in_case_have_names_that_differ(key: str) -> None:
    for other in {key.lower(), key.upper(), key.swapcase()} - {key}:
        assert encode_name(other) != encode_name(key)


@pytest.mark.parametrize("key", ["part-000", "A-z-09"])
def test_plain_keys_are_their_own_names(key: str) -> None:
    assert encode_name(key) == key


@pytest.mark.parametrize("key", ["x" * (LONGEST + 1), "/" * 100, "한" * 500])
def test_cut_names_are_not_decoded(key: str) -> None:
    with pytest.raises(ValueError, match="not a reversibly encoded name"):
        decode_name(encode_name(key))


@pytest.mark.parametrize(
    "name",
    [
        "_",
        "a_",
        "_2",
        "_zz",
        "a_4_411",
        pytest.param("_2F", id="upper case hexadecimal"),
        pytest.param("_61", id="an escaped letter"),
        pytest.param("a.b", id="an unescaped character"),
        pytest.param("한", id="not ASCII"),
        pytest.param("_ff", id="not UTF-8"),
        pytest.param("_ed_95", id="half a character"),
        pytest.param("_ed_a0_80", id="a surrogate"),
        pytest.param("x" * (LONGEST + 1), id="too long"),
    ],
)
def test_what_encode_name_cannot_have_written_is_not_decoded(name: str) -> None:
    with pytest.raises(ValueError, match="not a reversibly encoded name"):
        decode_name(name)
