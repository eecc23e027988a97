"""A sealed file passes as it was written, and no other file with the same seal does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalselect_assets.resources import seal
from scalselect_assets.resources.seal import HEADER, PAYLOAD, SealError


def sealed(before: bytes, after: bytes) -> tuple[bytes, dict[str, str]]:
    header = seal.to_be_sealed({"a": "b"})
    data = before + header[PAYLOAD].encode() + after
    whole = b"".join(seal.seal(data, header))
    return whole, {**header, PAYLOAD: whole[len(before) : len(before) + 64].decode()}


@given(st.binary(max_size=80), st.binary(max_size=80), st.data())
def test_any_changed_byte_is_noticed(before: bytes, after: bytes, data: st.DataObject) -> None:
    whole, header = sealed(before, after)
    seal.check(whole, header)
    changed = bytearray(whole)
    place = data.draw(st.integers(0, len(whole) - 1))
    changed[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SealError):
        seal.check(bytes(changed), header)


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_the_same_bytes_have_the_same_seal(before: bytes, after: bytes) -> None:
    assert sealed(before, after)[0] == sealed(before, after)[0]


def test_what_a_file_says_of_itself_is_checked_by_itself() -> None:
    header = seal.to_be_sealed({"a": "b"})
    assert seal.checked_header(header) == {"a": "b"}
    assert seal.checked_header({"a": "b"}) == {"a": "b"}, "from before there were hashes"
    for damaged in (
        {**header, "a": "c"},
        {**header, "b": "b"},
        {name: value for name, value in header.items() if name != "a"},
        {name: value for name, value in header.items() if name != HEADER},
        {name: value for name, value in header.items() if name != PAYLOAD},
    ):
        with pytest.raises(SealError):
            seal.checked_header(damaged)


def test_a_header_that_a_library_no_longer_finds_is_missed_where_its_bytes_are() -> None:
    with pytest.raises(SealError, match="cannot be read"):
        seal.checked_header({}, f"...{PAYLOAD}...".encode())


@pytest.mark.parametrize("value", [None, 3, "", "g" * 64, "a" * 63])
def test_a_hash_that_is_none_is_damage(value: object) -> None:
    with pytest.raises(SealError):
        seal.check(b"...", {PAYLOAD: value})
