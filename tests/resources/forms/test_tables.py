"""Parquet and saved Arrow tables are read row by row, with images as bytes or as paths."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from scalselect_assets.resources.sample_source import SampleSource
from scalselect_assets.resources.shard_reader import ShardFormatError
from tests.resources.forms.conftest import images_of, picture, reasons, rows_of, source_at, turns

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None, group: int = 3) -> Path:
    table = pa.Table.from_pylist(rows, schema)
    if path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, group)
    elif path.suffix == ".feather":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, group)
        path = path.rename(path.with_suffix(".arrow"))
    else:
        pq.write_table(table, path, row_group_size=group)
    return path


@pytest.mark.parametrize("name", ["s.parquet", "s.arrow", "s.feather"])
def test_embedded_images_are_opened_by_address_in_any_order(pool: Path, name: str) -> None:
    rows = [
        {"id": f"r{n}", "messages": turns(f"{'<image>' * (n % 3 + 1)}{n}?"),
         "images": [{"bytes": picture(10 * n + m), "path": f"{m}.png"} for m in range(n % 3 + 1)]}
        for n in range(8)
    ]  # fmt: skip
    key = write(pool / name, rows).name

    found = rows_of(pool, key)

    assert reasons(found) == [None] * 8
    assert [row.source_id for row in found] == [f"r{n}" for n in range(8)]
    assert found[4].image_paths == (f"{key}#4/0", f"{key}#4/1")
    expected = [[picture(10 * n + m) for m in range(n % 3 + 1)] for n in range(8)]
    assert images_of(pool, found) == expected
    assert images_of(pool, found[::-1]) == expected[::-1]
    assert source_at(pool).container(key) == "lines"
    index = source_at(pool).index_shard(key)
    assert (index.n_rows, index.images) == (8, ())


@pytest.mark.parametrize(
    "cell",
    [
        lambda n: {"images": [picture(n)]},
        lambda n: {"image": {"bytes": picture(n), "path": None}},
        lambda n: {"image": picture(n)},
        lambda n: {"jpg": {"bytes": picture(n), "path": "x.jpg"}},
        lambda n: {"images": [{"bytes": None, "path": f"{n}.png"}]},
        lambda n: {"images": [f"{n}.png"]},
        lambda n: {"image": f"{n}.png", "images": None},
    ],
    ids=["binary list", "image struct", "image binary", "another name", "path struct", "path list", "path"],
)
def test_images_are_bytes_or_paths_in_whichever_column_common_datasets_have(pool: Path, cell: Any) -> None:
    for n in range(3):
        (pool / f"{n}.png").write_bytes(picture(n))
    write(pool / "s.parquet", [{"messages": turns(f"<image>{n}?"), **cell(n)} for n in range(3)])

    found = rows_of(pool, "s.parquet")

    assert reasons(found) == [None] * 3
    assert images_of(pool, found) == [[picture(n)] for n in range(3)]


def test_turns_may_be_structs_with_nulls_or_json_text(pool: Path) -> None:
    parts = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
    ]
    (pool / "a.png").touch()
    write(pool / "s.parquet", [{"messages": parts, "images": ["a.png"], "source": None, "n": 1.5}])
    write(pool / "t.parquet", [{"conversations": json.dumps(turns()), "images": '["a.png"]'}])

    (row,), (other,) = rows_of(pool, "s.parquet"), rows_of(pool, "t.parquet")

    assert (row.rejection, other.rejection) == (None, None)
    assert "null" not in row.text
    assert json.loads(row.text)["n"] == 1.5


def test_a_table_without_turns_is_no_shard_and_a_damaged_one_is_named(pool: Path) -> None:
    write(pool / "s.parquet", [{"text": "x", "label": 1}])
    whole = write(pool / "t.parquet", [{"messages": turns(), "images": ["a.png"]}]).read_bytes()
    (pool / "t.parquet").write_bytes(whole[:-30])
    (pool / "u.arrow").write_bytes(b"no arrow")

    with pytest.raises(ShardFormatError, match=r"none of the columns holds turns \(text, label\)"):
        rows_of(pool, "s.parquet")
    for key in ("t.parquet", "u.arrow"):
        with pytest.raises(ShardFormatError, match="or is damaged"):
            rows_of(pool, key)
        assert source_at(pool).index_shard(key).n_rows is None


def test_a_missing_shard_is_no_damaged_one(pool: Path) -> None:
    with pytest.raises(FileNotFoundError):
        rows_of(pool, "gone.parquet")


def test_addresses_start_at_the_pool_whatever_the_image_root_is(pool: Path, tmp_path: Path) -> None:
    (pool / "sub").mkdir()
    other = tmp_path / "images"
    other.mkdir()
    (other / "a.png").write_bytes(picture(9))
    rows = [
        {"messages": turns("<image>0?"), "images": [{"bytes": picture(1), "path": None}]},
        {"messages": turns("<image>1?"), "images": [{"bytes": None, "path": "a.png"}]},
    ]
    write(pool / "sub" / "s.parquet", rows)
    fields = {"image_root": UPath(other)}

    found = rows_of(pool, "sub/s.parquet", **fields)

    assert reasons(found) == [None, None]
    assert images_of(pool, found, **fields) == [[picture(1)], [picture(9)]]
    assert source_at(pool, **fields).index_shard("sub/s.parquet").images == ("a.png",)


def test_a_table_in_an_object_store_reads_like_a_local_one(pool: Path) -> None:
    rows = [{"messages": turns(), "images": [{"bytes": picture(n), "path": None}]} for n in range(4)]
    local = write(pool / "s.parquet", rows)
    root = UPath("memory://tables")
    (root / "s.parquet").write_bytes(local.read_bytes())
    remote = SampleSource(root)

    found = list(remote.read_shard("s.parquet"))

    assert [row.sample_key for row in found] == [row.sample_key for row in rows_of(pool, "s.parquet")]
    assert [remote.open_image(path) for row in found for path in row.image_paths] == [
        picture(n) for n in range(4)
    ]


def test_a_saved_dataset_is_a_pool(pool: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "messages": [turns(f"<image>{n}?") for n in range(5)],
        "images": [[{"bytes": picture(n), "path": None}] for n in range(5)],
    }
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": [datasets.Image()],
        }
    )
    datasets.Dataset.from_dict(rows, features).save_to_disk(pool / "saved", num_shards=2)

    keys = list(source_at(pool / "saved").shard_keys())

    assert keys == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    found = [row for key in keys for row in rows_of(pool / "saved", key)]
    assert images_of(pool / "saved", found) == [[picture(n)] for n in range(5)]
