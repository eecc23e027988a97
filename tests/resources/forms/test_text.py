"""JSON is read compressed or not, and images inside it are opened by their address."""

import base64
import gzip
import json
from pathlib import Path

import pytest
import zstandard
from upath import UPath

from scalselect_assets.resources.sample_source import SampleSource
from scalselect_assets.resources.shard_reader import ShardFormatError
from tests.resources.forms.conftest import images_of, picture, reasons, rows_of, source_at, turns


def lines(*rows: dict) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def pack(kind: str, data: bytes) -> bytes:
    return gzip.compress(data) if kind == "gz" else zstandard.compress(data)


ROWS = [{"messages": turns(f"<image>{n}?", "x" * 100), "images": [f"{n}.png"], "id": n} for n in range(300)]


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("name", ["s.jsonl", "s.json"])
def test_a_compressed_shard_has_the_rows_of_the_plain_one(pool: Path, kind: str, name: str) -> None:
    data = lines(*ROWS) if name == "s.jsonl" else json.dumps(ROWS).encode()
    (pool / name).write_bytes(data)
    (pool / f"{name}.{kind}").write_bytes(pack(kind, data[:900]) + pack(kind, data[900:]))
    for n in range(300):
        (pool / f"{n}.png").touch()

    plain, packed = rows_of(pool, name), rows_of(pool, f"{name}.{kind}")

    assert packed == plain
    assert len(plain) == 300
    assert source_at(pool).container(f"{name}.{kind}") == source_at(pool).container(name)
    assert source_at(pool).index_shard(f"{name}.{kind}").images == source_at(pool).index_shard(name).images


# Zstandard data has a checksum only where its writer asked for one.
@pytest.mark.parametrize(
    ("kind", "damage"),
    [("gz", "cut"), ("gz", "plain"), ("gz", "flipped"), ("zst", "cut"), ("zst", "plain")],
)
def test_a_damaged_compressed_shard_is_named_and_its_index_is_of_its_bytes(
    pool: Path, kind: str, damage: str
) -> None:
    data = pack(kind, lines(*ROWS))
    broken = {"cut": data[:-20], "plain": lines(*ROWS), "flipped": data[:50] + bytes(40) + data[90:]}[damage]
    (pool / f"s.jsonl.{kind}").write_bytes(broken)

    with pytest.raises(ShardFormatError, match=rf"s\.jsonl\.{kind}: the file is (not|cut off)"):
        rows_of(pool, f"s.jsonl.{kind}")
    assert source_at(pool).index_shard(f"s.jsonl.{kind}").n_rows is None


def data_uri(number: int, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture(number)).decode()}"


PLACES = {
    "images": lambda uri: {"messages": turns(), "images": [uri]},
    "image": lambda uri: {"messages": turns(), "image": uri},
    "bytes": lambda uri: {"messages": turns(), "images": [{"bytes": uri.split(",")[1], "path": "x.png"}]},
    "image_url": lambda uri: {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}, "What?"]},
            {"role": "assistant", "content": "A dog."},
        ]
    },
    "base64 part": lambda uri: {
        "messages": [
            {"role": "user", "content": [{"type": "image", "base64": uri.split(",")[1]}, "What?"]},
            {"role": "assistant", "content": "A dog."},
        ]
    },
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["sub/s.jsonl", "sub/s.jsonl.gz"])
def test_an_image_inside_a_row_has_an_address_that_opens_it(pool: Path, place: str, name: str) -> None:
    rows = [{**PLACES[place](data_uri(n)), "n": n} for n in range(5)]
    (pool / "sub").mkdir()
    data = lines(*rows)
    (pool / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)

    found = rows_of(pool, name)

    assert reasons(found) == [None] * 5
    assert [row.image_paths for row in found] == [(f"{name}#{n}/0",) for n in range(5)]
    assert all(len(row.text) < 400 for row in found)
    assert list(reversed(images_of(pool, found[::-1]))) == [[picture(n)] for n in range(5)]
    assert source_at(pool).index_shard(name).images == ()
    again = source_at(pool).export_text(name, found[3].text, found[3].image_paths)
    assert base64.b64encode(picture(3)).decode() in again


def test_the_key_of_an_embedded_image_is_its_content(pool: Path) -> None:
    rows = [{**PLACES["images"](data_uri(n)), "n": n} for n in (1, 2)]
    (pool / "s.jsonl").write_bytes(lines(*rows, rows[0], {**rows[0], "n": 7}))
    (pool / "t.jsonl").write_bytes(lines(*rows[::-1]))

    found, others = rows_of(pool, "s.jsonl"), rows_of(pool, "t.jsonl")

    assert reasons(found) == [None, None, "duplicate", None]
    assert others[0].sample_key == found[1].sample_key
    assert others[1].sample_key == found[0].sample_key


def test_a_text_that_only_looks_like_an_image_stays_a_text(pool: Path) -> None:
    said = turns(f"<image>{data_uri(1)}", data_uri(2))
    (pool / "s.jsonl").write_bytes(lines({"messages": said, "images": ["a.png"], "note": {"bytes": "12"}}))
    (pool / "a.png").touch()

    (row,) = rows_of(pool, "s.jsonl")

    assert row.rejection is None
    assert data_uri(2) in row.text


def test_a_wrong_address_is_a_missing_image(pool: Path) -> None:
    (pool / "s.jsonl").write_bytes(lines(PLACES["images"](data_uri(1))))
    source = SampleSource(UPath(pool))

    for address in ("s.jsonl#1/0", "s.jsonl#0/1", "gone.jsonl#0/0"):
        with pytest.raises(FileNotFoundError):
            source.open_image(address)
    with pytest.raises((PermissionError, FileNotFoundError)):
        source.open_image("../pool/../secret.jsonl#0/0")
    with pytest.raises((PermissionError, FileNotFoundError)):
        source.open_image("/etc/passwd.jsonl#0/0")


def test_an_image_in_a_damaged_shard_is_missing(pool: Path) -> None:
    (pool / "s.jsonl.gz").write_bytes(gzip.compress(lines(PLACES["images"](data_uri(1))))[:60])

    with pytest.raises(FileNotFoundError, match="cut off"):
        source_at(pool).open_image("s.jsonl.gz#0/0")


def test_a_replaced_shard_gives_its_own_images(pool: Path) -> None:
    path = pool / "s.jsonl"
    for number in (1, 2):
        path.write_bytes(lines({**PLACES["images"](data_uri(number)), "n": "x" * number}))
        assert source_at(pool).open_image("s.jsonl#0/0") == picture(number)


def test_a_git_lfs_pointer_is_named(pool: Path) -> None:
    (pool / "s.jsonl").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")

    with pytest.raises(ShardFormatError, match="git lfs pull"):
        rows_of(pool, "s.jsonl")


def test_lines_that_end_in_commas_say_so(pool: Path) -> None:
    (pool / "s.jsonl").write_bytes(b'{"messages": [], "id": 1},\n{"messages": [], "id": 2},\n')

    assert {row.rejection.detail.split(" (")[0] for row in rows_of(pool, "s.jsonl") if row.rejection} == {
        "the row ends with a comma"
    }
