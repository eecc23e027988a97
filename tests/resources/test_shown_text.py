"""What is shown of data acts on no terminal and holds no password."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalselect_assets.resources.shown_text import has_credentials, json_shown, masked, shown

any_text = st.text(st.characters())


@given(any_text)
def test_nothing_that_is_shown_acts(text: str) -> None:
    for line in shown(text).split("\n"):
        assert all(unicodedata.category(one) not in {"Cc", "Cs", "Zl", "Zp"} for one in line)
        line.encode()


@given(any_text)
def test_json_stays_the_same_value(text: str) -> None:
    written = json_shown(json.dumps({text: text}, ensure_ascii=False))
    assert json.loads(written) == {text: text}
    assert all(unicodedata.category(one) not in {"Cc", "Cs", "Zl", "Zp"} for one in written)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[31mred\x1b[0m\r", "\\x1b[31mred\\x1b[0m\\x0d"),
        ("a\u202eb\u2066", "a\\u202eb\\u2066"),
        ("\x9b2J\x07\x7f", "\\x9b2J\\x07\\x7f"),
        ("bad\udc80name", "bad\\udc80name"),
        ("한국 [bold]:smile:[/bold]\nnext", "한국 [bold]:smile:[/bold]\nnext"),
    ],
)
def test_characters_that_act_are_written_as_their_escapes(text: str, expected: str) -> None:
    assert shown(text) == expected


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:secret@bucket/pool",
        "s3://key:sec/ret@bucket/pool",
        "https://secret@host/x",
        "sftp://user:p@secret@host/x",
        "simplecache::s3://key:secret@bucket/x",
        "a message about 's3://key:secret@bucket/pool' and https://me:secret@host:80/",
    ],
)
def test_credentials_are_found_and_masked(uri: str) -> None:
    assert has_credentials(uri)
    assert "secret" not in masked(uri)
    assert "sec/ret" not in masked(uri)
    assert "key:" not in masked(uri)


@pytest.mark.parametrize(
    "uri", ["s3://bucket/a@b/c", "http://host:9000/a@b", "memory://x", "/a/b@c:d", "team@x.org", "s3://b/a:b"]
)
def test_other_uris_stay_as_they_are(uri: str) -> None:
    assert not has_credentials(uri)
    assert masked(uri) == uri
