"""A list of samples is read as whatever people keep such lists in."""

import json
from pathlib import Path

import pytest
from upath import UPath

from scalselect_assets.choice.lists import SampleListError, read_list

ENTRIES = ["a", "7", "한 b"]
OBJECTS = [{"id": "x", "sample_key": entry} for entry in ENTRIES]
FILES = {
    "plain.txt": "a\n\n# a comment\n 7 \n한 b\na\n",
    "mark.txt": "\ufeffa\n7\n한 b",
    "windows.txt": "\ufeffa\r\n7\r\n한 b\r\n",
    "noending": "a\n7\n한 b",
    "header.csv": "sample_key,score\na,1\n7,2\n한 b,3\n",
    "excel.csv": "\ufeffScore,ID\r\n1,a\r\n2,7\r\n3,한 b\r\n",
    "bare.csv": "a\n7\n한 b\n",
    "tabs.tsv": "rank\timage_sha256\n1\ta\n2\t7\n3\t한 b\n",
    "list.json": json.dumps(["a", 7, "한 b"]),
    "objects.json": json.dumps(OBJECTS),
    "lines.jsonl": "".join(json.dumps(row) + "\n" for row in OBJECTS),
    "strings.jsonl": '"a"\n7\n"한 b"\n',
}


@pytest.mark.parametrize("name", FILES)
def test_a_list_is_read_from_text_tables_and_json(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name].encode())

    assert read_list(UPath(tmp_path / name)) == ENTRIES


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("gone.txt", None, "cannot be read"),
        ("latin.txt", b"caf\xe9", "UTF-8"),
        ("x.csv", b"a,b\n1,2\n", "one of them has to be named"),
        ("x.json", b"[1, {}]", "an entry is a string"),
        ("x.jsonl", b"{oops", "is not JSON"),
    ],
)
def test_what_is_no_list_says_what_it_should_be(
    tmp_path: Path, name: str, content: bytes | None, what: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)

    with pytest.raises(SampleListError, match=what):
        read_list(UPath(tmp_path / name))
