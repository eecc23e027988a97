"""A file's rows come out verbatim however it is cut into chunks, or the file is refused with its line."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath

from scalselect_assets.resources import shard_reader
from scalselect_assets.resources.shard_reader import (
    RowText,
    ShardFormatError,
    iter_rows,
    recognise,
    rows_of,
    split_shard,
)

ROW = {
    "messages": [{"role": "user", "content": "무엇? \u2028 “왜” 🙂"}, {"role": "assistant", "content": "네"}]
}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def cut(data: bytes, size: int):
    return (data[start : start + size] for start in range(0, len(data), size))


def read(data: bytes, name: str = "pool.json", size: int = 1 << 20) -> list[RowText]:
    return list(rows_of(cut(data, size), UPath(name)))


def as_lines(*rows: object) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


@settings(deadline=None)
@given(
    rows=st.lists(json_values, max_size=6),
    size=st.integers(1, 40),
    indent=st.none() | st.integers(0, 3),
    escaped=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_rows_of_an_array_survive_any_cut_into_chunks(rows, size, indent, escaped, newline):
    data = json.dumps(rows, indent=indent, ensure_ascii=escaped).replace("\n", newline).encode()

    found = read(data, size=size)

    assert [row.row for row in found] == list(range(len(rows)))
    assert [json.dumps(json.loads(row.text)) for row in found] == [json.dumps(row) for row in rows]
    lines = data.decode().split("\n")
    assert all(row.text.split("\n")[0] in lines[row.line - 1] for row in found)
    assert all(row.text in data.decode() and row.text.strip() == row.text for row in found)


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=6), json_values, max_size=4), max_size=6),
    size=st.integers(1, 40),
    escaped=st.booleans(),
    blank=st.sampled_from(["", "\n", " \t\r\n\n"]),
)
def test_rows_of_json_lines_survive_any_cut_into_chunks(rows, size, escaped, blank):
    texts = [json.dumps(row, ensure_ascii=escaped) for row in rows]
    data = "".join(f"{blank}  {text} \r\n" for text in texts).encode()

    found = read(data, "pool.jsonl", size)

    assert [row.text for row in found] == texts
    assert [row.row for row in found] == list(range(len(rows)))
    step = 1 + blank.count("\n")
    assert [row.line for row in found] == [step * (place + 1) for place in range(len(rows))]


@pytest.mark.parametrize("size", range(1, 12))
def test_numbers_and_words_cut_at_a_chunk_end_stay_whole(size):
    texts = [
        "12",
        "345.5e+10",
        "-Infinity",
        "NaN",
        "true",
        "-0",
        '"\\ud83d\\ude42"',
        '"\\\\"',
        f"1{'0' * 5000}",
    ]

    assert [row.text for row in read(f"[{', '.join(texts)}]".encode(), size=size)] == texts


def test_a_row_of_many_chunks_is_decoded_only_a_few_times(monkeypatch):
    decoded = []

    class Counting:
        def raw_decode(self, text, position):
            decoded.append(len(text) - position)
            return json.JSONDecoder().raw_decode(text, position)

    monkeypatch.setattr(shard_reader, "_DECODER", Counting())
    data = json.dumps([{"text": "x" * 100_000}]).encode()

    assert len(read(data, size=10)) == 1
    assert sum(decoded) < 4 * len(data)


def test_a_byte_order_mark_and_space_before_the_rows_are_passed_over():
    for size in (1, 2, 3, 4, 100):
        assert [row.text for row in read(b"\xef\xbb\xbf \n[1]", size=size)] == ["1"]
        lines = read(b"\xef\xbb\xbf\n" + as_lines(ROW), "a.jsonl", size)
        assert [(row.line, json.loads(row.text)) for row in lines] == [(2, ROW)]


def test_a_broken_line_is_a_row_and_blank_lines_are_none():
    data = as_lines(ROW) + b'\n  \n{"messages": [\n' + as_lines(ROW)

    found = read(data, "a.jsonl")

    assert [(row.row, row.line) for row in found] == [(0, 1), (1, 4), (2, 5)]
    assert found[1].text == '{"messages": ['


def test_bytes_that_are_not_utf8_spoil_only_their_own_line():
    found = read(as_lines(ROW) + b'{"id": "caf\xe9"}\n' + as_lines(ROW), "a.jsonl")

    assert [row.error is None for row in found] == [True, False, True]
    assert found[1].text == '{"id": "caf\\xe9"}'
    assert "0xe9" in found[1].error


def test_an_empty_file_is_an_empty_shard_only_where_its_name_says_lines():
    for data in (b"", b" \n\t", b"\xef\xbb\xbf"):
        assert read(data, "a.jsonl") == read(data, "a.NDJSON") == []
        with pytest.raises(ShardFormatError, match=r"a\.json: the file is empty"):
            read(data, "a.json")
    assert read(b"[ \n]") == []


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"),
        (b"PAR1\x15\x04", r"PAR1\x15\x04"),
        (b"\x1f\x8b\x08\0", r"\x1f\x8b\x08\x00"),
        (b"\xff\xfe[\0]\0", r"\xff\xfe[\x00]\x00"),
        (b'"a"', '"a"'),
        (b"\xef", r"\xef"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_its_first_bytes(name, data, shown):
    with pytest.raises(ShardFormatError, match=re.escape(f"{name}: the file begins with b'{shown}'")):
        read(data, name)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b'[\n{"a": 1},\n{"b": ',
            r"not closed: the file ends on line 3, inside row 1, which starts on line 3",
        ),
        (b'[\n{"a": 1},\n{"b": "x\\u12', r"not closed: the file ends on line 3, inside row 1"),
        (b'[{"a": 1}', r"not closed: the file ends on line 1, after row 0"),
        (b'[\n{"a": 1},\n', r"not closed: the file ends on line 3, inside row 1"),
        (b"[", r"not closed: the file ends on line 1, inside row 0"),
        (b'[{"a": 1}\n{"b": 2}]', r"line 2 has '\{' after row 0, where a comma or \] is due"),
        (b'[{"a": 1},\n]', r"line 2 is not JSON: Expecting value \(row 1, from line 2\)"),
        (b'[{"a":\n1,}, {}]', r"line 2 is not JSON: .* \(row 0, from line 1\)"),
        (b'[{"a": "x\ny"}]', r"line 1 is not JSON: Invalid control character"),
        (b"[1]\n[2]", r"line 2 goes on with '\[2\]' after the end of the array"),
        (b'[1,\n2,\n"\xe9", 4]', r"line 3 holds byte 0xe9, which is not UTF-8"),
        (b"[1]\n\xed\xa0\x80", r"line 2 holds byte 0xed, which is not UTF-8"),
        (b"[1]\xe2\x82", r"line 1 holds byte 0xe2, which is not UTF-8"),
        (b"[" * 100_000, r"row 0 on line 1 is nested too deeply"),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_broken_array_is_refused_with_the_line(data, message, size):
    with pytest.raises(ShardFormatError, match=message):
        read(data, size=size)


def test_the_rows_before_a_broken_place_have_been_given():
    rows = rows_of(cut(b'[{"a": 1}, {"b": }]', 4), UPath("a.json"))

    assert next(rows).text == '{"a": 1}'
    with pytest.raises(ShardFormatError):
        next(rows)


def test_a_syntax_error_is_reported_without_reading_the_rest():
    taken = 0

    def endless():
        nonlocal taken
        yield b'[{"a": 1 "b"}'
        while True:
            taken += 1
            assert taken < 10
            yield b', {"a": 1}'

    with pytest.raises(ShardFormatError, match="Expecting ',' delimiter"):
        list(rows_of(endless(), UPath("a.json")))


@pytest.mark.parametrize(("name", "data"), [("a.json", b'[{"a": ['), ("a.jsonl", b'{"a": [')])
def test_a_row_without_end_is_refused_before_it_fills_the_memory(monkeypatch, name, data):
    monkeypatch.setattr(shard_reader, "MAX_ROW_LENGTH", 1000)

    def endless():
        yield data
        while True:
            yield b"[1], "

    with pytest.raises(ShardFormatError, match=r"line 1 (is longer than|does not end within) 1000"):
        list(rows_of(endless(), UPath(name)))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    "value",
    [
        {"dataset": {"name": "x"}, "splits": [1, 2]},
        {"id": 1, **ROW},
    ],
)
def test_one_pretty_printed_object_is_no_shard(name, value):
    with pytest.raises(ShardFormatError, match="is a JSON object over"):
        read(json.dumps(value, indent=2).encode(), name)


def test_turns_on_lines_of_their_own_do_not_make_a_printed_object_a_shard():
    data = b'{\n"conversations": [\n{"from": "human", "value": "a"},\n{"from": "gpt", "value": "b"}\n]\n}\n'

    with pytest.raises(ShardFormatError, match="over 6 line"):
        read(data, "a.jsonl")


def test_one_object_on_one_line_is_a_row_only_where_it_may_be_one():
    with pytest.raises(ShardFormatError, match=r"dataset_info\.json: the file is a JSON object"):
        read(as_lines({"dataset": "x"}), "dataset_info.json")

    assert len(read(as_lines({"dataset": "x"}), "a.jsonl")) == 1
    assert len(read(as_lines(ROW), "a.json")) == 1
    assert len(read(as_lines({"id": 1}, ROW), "a.json")) == 2


def test_the_container_is_told_by_content(tmp_path):
    for name, data, kind in (("a.jsonl", b" [1]", "array"), ("b.json", as_lines(ROW), "lines")):
        (tmp_path / name).write_bytes(data)
        assert recognise(iter([(tmp_path / name).read_bytes()]), UPath(name))[0] == kind


def test_a_file_is_read_from_any_file_system():
    path = UPath("memory:///shard-reader/a b#?%.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(as_lines(ROW, ROW))

    assert [json.loads(row.text) for row in iter_rows(path, chunk_bytes=5)] == [ROW, ROW]


@pytest.mark.parametrize("size", [3, 1 << 20])
def test_splitting_keeps_rows_verbatim_and_arrays_arrays(tmp_path, size):
    texts = [f'{{"id": {n}.50,  "messages": [\n  "é 한"]}}' for n in range(7)]
    source = tmp_path / "pool [a].json"
    source.write_text("[" + " ,\n ".join(texts) + "]\n", encoding="utf-8")

    result = split_shard(UPath(source), 3, tmp_path / "out", chunk_bytes=size)

    assert [path.name for path in result.files] == [f"pool [a]-0000{n}.json" for n in range(3)]
    assert result.n_rows == 7
    assert sorted((tmp_path / "out").iterdir()) == list(result.files)
    assert all(isinstance(json.loads(path.read_text(encoding="utf-8")), list) for path in result.files)
    shards = [[row.text for row in iter_rows(UPath(path))] for path in result.files]
    assert shards == [texts[:3], texts[3:6], texts[6:]]


def test_splitting_keeps_lines_lines_and_loses_no_broken_one(tmp_path):
    lines = [
        json.dumps(ROW).encode(),
        b'{"messages": "caf\xe9"}',
        b'{"messages": [',
        json.dumps(ROW).encode(),
    ]
    source = tmp_path / "pool.json"
    source.write_bytes(b"\xef\xbb\xbf" + b" \r\n\n".join(lines))

    result = split_shard(UPath(source), 2, tmp_path)

    assert [path.name for path in result.files] == ["pool-00000.jsonl", "pool-00001.jsonl"]
    assert b"".join(path.read_bytes() for path in result.files) == b"\n".join([*lines, b""])
    assert result.n_rows == 4


def test_splitting_never_overwrites_a_shard(tmp_path):
    source = tmp_path / "pool.json"
    source.write_bytes(b"[1, 2]")
    (tmp_path / "pool-00007.jsonl.gz").write_bytes(b"earlier")
    (tmp_path / "other-00000.json").write_bytes(b"of another pool")

    with pytest.raises(FileExistsError, match=r"already holds 1 shard\(s\) of 'pool'.*pool-00007"):
        split_shard(UPath(source), 1, tmp_path)

    assert len(list(tmp_path.iterdir())) == 3


def test_splitting_a_broken_file_leaves_nothing_behind(tmp_path):
    source = tmp_path / "pool.json"
    source.write_bytes(b"[1, 2, 3, ")

    with pytest.raises(ShardFormatError, match="not closed"):
        split_shard(UPath(source), 1, tmp_path / "out")

    assert list((tmp_path / "out").iterdir()) == []


def test_splitting_an_empty_pool_gives_no_shard(tmp_path):
    (tmp_path / "pool.json").write_bytes(b"[]")

    result = split_shard(UPath(tmp_path / "pool.json"), 10, tmp_path / "out")

    assert (result.files, result.n_rows) == ((), 0)


def test_a_shard_has_at_least_one_row(tmp_path):
    with pytest.raises(ValueError, match="rows_per_shard=0"):
        split_shard(UPath(tmp_path / "pool.json"), 0, tmp_path)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_white_space_before_the_first_row_is_passed_over_and_its_lines_are_counted(size, bom):
    (row,) = read(bom + b" \n\t\r\n\n" + b'{"messages": []}', "pool.jsonl", size)
    assert (row.line, row.text) == (4, '{"messages": []}')
    (row,) = read(bom + b" \n\t\r\n\n" + b"[1]", size=size)
    assert (row.line, row.text) == (4, "1")


def test_a_file_that_begins_with_too_much_white_space_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(shard_reader, "_MAX_LEADING_SPACE", 100)
    assert len(read(b" " * 90 + b"[1]", size=10)) == 1
    chunks = iter([b" " * 60] * 3 + [b"[1]"])
    with pytest.raises(ShardFormatError, match="begins with more than 100 bytes of white space"):
        list(rows_of(chunks, UPath("pool.json")))
    assert list(chunks) == [b" " * 60, b"[1]"]


def test_each_chunk_before_the_first_row_is_looked_at_once():
    class Chunk(bytes):
        looked_at = 0

        def lstrip(self, *arguments):
            Chunk.looked_at += len(self)
            return super().lstrip(*arguments)

    chunks = [Chunk(b"\n" * 100) for _ in range(200)]
    assert [row.text for row in rows_of(iter([*chunks, b"[1]"]), UPath("pool.json"))] == ["1"]
    assert Chunk.looked_at <= 200 * 100
