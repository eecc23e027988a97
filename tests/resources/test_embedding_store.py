"""A shard's vectors are replaced in one commit and read at the version that was recorded."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from upath import UPath

from scalselect_assets.resources.embedding_store import (
    EmbeddingStore,
    EmbeddingTable,
    EmbeddingTableError,
    table_name,
)

ROOT = Path(__file__).parents[2]
DIMENSION = 4
HOSTILE = [
    "a/b",
    "a_2fb",
    "..",
    "../../escaped",
    "' OR 1=1; DROP TABLE x; --",
    '"quoted" `and` \\slashed\\',
    "한국/부분",
    "100%",
    "new\nline",
    " ",
    "x" * 300,
    "x" * 299 + "y",
]


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(UPath(tmp_path / "store" / "lance"), {})


def vectors_of(n_rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n_rows, DIMENSION)).astype(np.float32)


def put(
    store: EmbeddingStore,
    shard: str = "s.jsonl",
    n_rows: int = 10,
    *,
    seed: int = 0,
    fingerprint: str = "f1",
    **changes: Any,
) -> EmbeddingTable:
    """Replace the shard by seeded vectors, or by what ``changes`` says."""
    arguments: dict[str, Any] = {
        "dimension": DIMENSION,
        "rows": range(100, 100 + n_rows),
        "sample_keys": [f"key-{row}" for row in range(n_rows)],
        "source_ids": [f"id-{row}" for row in range(n_rows)],
        "vectors": vectors_of(n_rows, seed),
        "attributes": {"n_tokens": pa.array(range(n_rows), pa.int32())},
    }
    return store.replace(fingerprint, shard, **{**arguments, **changes})


def rows_of(store: EmbeddingStore, table: EmbeddingTable) -> list[tuple[int, str, str | None, bytes]]:
    """What the store gives of a table, in the order of its rows."""
    return sorted(
        (int(row), key, source_id, vector.tobytes())
        for batch in store.read(table)
        for row, key, source_id, vector in zip(
            batch.row, batch.sample_key, batch.source_id, batch.vector, strict=True
        )
    )


def opened(store: EmbeddingStore, table: str) -> Any:
    """The latest version of a table, by LanceDB itself."""
    return lancedb.connect(str(store.folder)).open_table(table)


# Round trips


def test_rows_come_back_bit_for_bit(store: EmbeddingStore) -> None:
    vectors = vectors_of(6)
    vectors[0] = [-0.0, 0.0, 1e-45, np.finfo(np.float32).max]
    source_ids = ["7", None, "", "한\n'\"", None, "x" * 500]

    table = put(
        store,
        n_rows=6,
        vectors=vectors,
        source_ids=source_ids,
        rows=[5, 4, 3, 2, 1, 0],
        sample_keys=list("abcdef"),
    )

    back = {row: (key, source_id, vector) for row, key, source_id, vector in rows_of(store, table)}
    for position, row in enumerate([5, 4, 3, 2, 1, 0]):
        assert back[row] == ("abcdef"[position], source_ids[position], vectors[position].tobytes())
    assert (table.n_rows, table.dimension, table.shard, table.fingerprint) == (6, DIMENSION, "s.jsonl", "f1")


def test_batches_have_the_declared_types(store: EmbeddingStore) -> None:
    table = put(store)

    for batch in store.read(table):
        assert (batch.row.dtype, batch.vector.dtype) == (np.int64, np.float32)
        assert batch.vector.shape == (len(batch.row), DIMENSION)


def test_attributes_are_columns_of_their_own_type(store: EmbeddingStore) -> None:
    attributes = {
        "n_tokens": pa.array([3, None, 5], pa.int32()),
        "vision_attention": pa.array([0.1, 0.2, None], pa.float32()),
        "image_sha256": pa.array([["a", "b"], [], None], pa.list_(pa.string())),
    }

    table = put(store, n_rows=3, attributes=attributes)

    stored = opened(store, table.table).to_arrow()
    assert stored.column_names == ["row", "sample_key", "vector", "source_id", *attributes, "row_sha256"]
    for name, array in attributes.items():
        assert stored.column(name).type == array.type
        assert stored.column(name).to_pylist() == array.to_pylist()


def test_the_table_carries_its_shard_and_model(store: EmbeddingStore) -> None:
    table = put(store, "한/" + "x" * 300, fingerprint="f9")

    metadata = opened(store, table.table).schema.metadata

    assert metadata[b"scalselect.shard"].decode() == "한/" + "x" * 300
    assert metadata[b"scalselect.fingerprint"] == b"f9"


@pytest.mark.parametrize("layout", ["by column", "every other", "backwards"])
def test_the_layout_in_memory_does_not_matter(store: EmbeddingStore, layout: str) -> None:
    plain = vectors_of(10)
    laid_out = {
        "by column": np.asfortranarray(plain),
        "every other": np.repeat(plain, 2, axis=0)[::2],
        "backwards": plain[::-1].copy()[::-1],
    }[layout]

    expected = put(store, "plain", vectors=plain)
    table = put(store, "other", vectors=laid_out)

    assert rows_of(store, table) == rows_of(store, expected)
    assert table.content_sha256 == expected.content_sha256


def test_a_shard_without_rows_is_a_readable_empty_table(store: EmbeddingStore) -> None:
    table = put(store, n_rows=0)

    assert list(store.read(table)) == []
    assert (table.n_rows, table.dimension) == (0, DIMENSION)
    assert opened(store, table.table).schema.field("vector").type == pa.list_(pa.float32(), DIMENSION)


def test_a_shard_may_lose_all_rows_and_get_some_again(store: EmbeddingStore) -> None:
    full = put(store, n_rows=10)
    empty = put(store, n_rows=0)
    again = put(store, n_rows=3)

    assert [len(rows_of(store, table)) for table in (full, empty, again)] == [10, 0, 3]


def test_reading_streams_in_batches(store: EmbeddingStore) -> None:
    table = put(store, n_rows=10)

    batches = list(store.read(table, batch_rows=3))

    assert len(batches) >= 4
    assert max(len(batch.row) for batch in batches) <= 3
    assert sorted(row for batch in batches for row in batch.row) == list(range(100, 110))
    np.testing.assert_array_equal(np.concatenate([batch.vector for batch in batches]), vectors_of(10))


def test_every_row_is_read_of_more_than_one_batch(store: EmbeddingStore) -> None:
    table = put(store, n_rows=2500)

    assert len(rows_of(store, table)) == 2500


# Replacing


def test_a_rerun_replaces_and_is_a_version_of_its_own(store: EmbeddingStore) -> None:
    first = put(store, seed=1)
    rerun = put(store, seed=1)

    assert opened(store, rerun.table).count_rows() == 10
    assert rows_of(store, rerun) == rows_of(store, first)
    assert rerun.version > first.version
    assert replace(rerun, version=first.version) == first
    assert store.table_names() == {first.table}


def test_the_old_version_stays_readable_where_it_was_recorded(store: EmbeddingStore) -> None:
    old = put(store, n_rows=10, seed=1)
    before = rows_of(store, old)

    new = put(store, n_rows=4, seed=2)

    assert rows_of(store, old) == before
    assert len(rows_of(store, new)) == 4
    assert {row[3] for row in rows_of(store, new)}.isdisjoint(row[3] for row in before)


def test_a_replacement_during_a_read_does_not_reach_the_reader(store: EmbeddingStore) -> None:
    table = put(store, n_rows=10, seed=1)

    batches = store.read(table, batch_rows=1)
    seen = [next(batches).vector]
    put(store, n_rows=10, seed=2)
    seen += [batch.vector for batch in batches]

    np.testing.assert_array_equal(np.concatenate(seen), vectors_of(10, seed=1))


def test_the_columns_may_change_with_a_new_version(store: EmbeddingStore) -> None:
    put(store, attributes={"n_tokens": pa.array(range(10), pa.int32())})

    table = put(store, n_rows=2, attributes={"other": pa.array(["a", "b"])})

    names = ["row", "sample_key", "vector", "source_id", "other", "row_sha256"]
    assert opened(store, table.table).schema.names == names
    assert len(rows_of(store, table)) == 2


def test_equal_content_has_an_equal_hash_and_other_content_another(store: EmbeddingStore) -> None:
    tables = {
        "as is": put(store, "a"),
        "one bit": put(store, "b", vectors=_one_bit_off(vectors_of(10))),
        "other keys": put(store, "c", sample_keys=[f"other-{row}" for row in range(10)]),
        "another order": put(store, "d", vectors=vectors_of(10)[::-1]),
        "fewer rows": put(store, "e", n_rows=9),
        "negative zero": put(store, "f", vectors=np.full((10, DIMENSION), -0.0, np.float32)),
        "zero": put(store, "g", vectors=np.zeros((10, DIMENSION), np.float32)),
    }

    assert put(store, "elsewhere", fingerprint="f2").content_sha256 == tables["as is"].content_sha256
    assert len({table.content_sha256 for table in tables.values()}) == len(tables)


def _one_bit_off(vectors: np.ndarray) -> np.ndarray:
    vectors[-1, -1] = np.nextafter(vectors[-1, -1], np.float32(np.inf))
    return vectors


def test_models_do_not_touch_each_others_tables(store: EmbeddingStore) -> None:
    one = put(store, seed=1, fingerprint="f1")
    other = put(store, n_rows=3, seed=2, fingerprint="f2")
    before = rows_of(store, one)
    put(store, n_rows=5, seed=3, fingerprint="f2")

    assert one.table != other.table
    assert rows_of(store, one) == before
    assert opened(store, one.table).version == one.version
    assert store.table_names() == {one.table, other.table}


def test_hostile_names_each_have_a_table_of_their_own(store: EmbeddingStore, tmp_path: Path) -> None:
    tables = {shard: put(store, shard, seed=number) for number, shard in enumerate(HOSTILE)}

    assert len({table.table for table in tables.values()}) == len(HOSTILE)
    for number, (shard, table) in enumerate(tables.items()):
        assert table.table == table_name("f1", shard)
        np.testing.assert_array_equal(
            np.concatenate([batch.vector for batch in store.read(table)]), vectors_of(10, seed=number)
        )
    assert store.table_names() == {table.table for table in tables.values()}
    assert {path.parent for path in tmp_path.rglob("*.lance") if path.is_dir()} == {Path(store.folder.path)}
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_store_may_lie_under_a_hostile_name(tmp_path: Path) -> None:
    store = EmbeddingStore(UPath(tmp_path / "한 글 100%20 #?'\"" / "lance"), {})

    table = put(store)

    assert len(rows_of(store, table)) == 10
    assert store.table_names() == {table.table}
    assert [path.name for path in tmp_path.iterdir()] == ["한 글 100%20 #?'\""]


def test_table_names_lists_what_is_there(store: EmbeddingStore) -> None:
    assert store.table_names() == set()

    tables = {put(store, "a/b").table, put(store, "c", n_rows=0).table, put(store, fingerprint="f2").table}

    assert store.table_names() == tables
    assert set(lancedb.connect(str(store.folder)).list_tables().tables) == tables


# Refusals


def _with(value: float, row: int) -> np.ndarray:
    vectors = vectors_of(10)
    vectors[row, 2] = value
    return vectors


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "float64": ({"vectors": vectors_of(10).astype(np.float64)}, r"'s\.jsonl' are float64 .*expected float32"),
    "float16": ({"vectors": vectors_of(10).astype(np.float16)}, r"are float16 .*expected float32"),
    "too few dimensions": ({"vectors": vectors_of(10)[:, :3]}, r"\(10, 3\), expected float32 \(10, 4\)"),
    "another dimension": ({"dimension": 5}, r"\(10, 4\), expected float32 \(10, 5\)"),
    "fewer vectors": ({"vectors": vectors_of(9)}, r"\(9, 4\), expected float32 \(10, 4\)"),
    "flat": ({"vectors": vectors_of(10).reshape(-1)}, r"\(40,\), expected float32 \(10, 4\)"),
    "not a number": (
        {"vectors": _with(np.nan, 7)},
        r"row 107 \(sample key-7\) of shard 's\.jsonl' is not fi",
    ),
    "infinity": ({"vectors": _with(np.inf, 9)}, r"row 109 \(sample key-9\) of shard 's\.jsonl' is not fin"),
    "minus infinity": (
        {"vectors": _with(-np.inf, 0)},
        r"row 100 \(sample key-0\) of shard 's\.jsonl' is not",
    ),
    "repeated key": ({"sample_keys": ["key-0", *(f"key-{n}" for n in range(9))]}, "10 rows but 9 distinct"),
    "too few keys": ({"sample_keys": ["key-0"]}, "10 rows but 1 distinct"),
    "too few ids": ({"source_ids": ["id-0"]}, "source_id"),
    "too few attributes": ({"attributes": {"n_tokens": pa.array([1])}}, "n_tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_not_written(store: EmbeddingStore, case: str) -> None:
    changes, message = REFUSED[case]

    with pytest.raises(ValueError, match=message):
        put(store, **changes)

    assert store.table_names() == set()


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_leaves_the_old_version(store: EmbeddingStore, case: str) -> None:
    changes, message = REFUSED[case]
    table = put(store, seed=5)
    before = rows_of(store, table)

    with pytest.raises(ValueError, match=message):
        put(store, seed=6, **changes)

    assert opened(store, table.table).version == table.version
    assert rows_of(store, table) == before


# Tables that are not what was recorded


def test_a_dropped_table_is_an_error_that_names_shard_and_remedy(store: EmbeddingStore) -> None:
    table = put(store, "한/s.jsonl")
    lancedb.connect(str(store.folder)).drop_table(table.table)

    with pytest.raises(EmbeddingTableError, match=r"materialize attention_embeddings\[한/s\.jsonl\] again"):
        next(store.read(table))


def test_a_table_that_was_dropped_and_made_again_is_not_taken_for_the_recorded_one(
    store: EmbeddingStore,
) -> None:
    table = put(store, seed=1)
    lancedb.connect(str(store.folder)).drop_table(table.table)
    again = put(store, seed=2)
    assert (again.table, again.version) == (table.table, table.version)

    with pytest.raises(EmbeddingTableError, match="recorded was"):
        next(store.read(table))


def test_a_store_that_is_gone_is_the_same_error(store: EmbeddingStore) -> None:
    table = put(store)
    shutil.rmtree(store.folder.path)

    with pytest.raises(EmbeddingTableError, match=r"materialize attention_embeddings\[s\.jsonl\] again"):
        next(store.read(table))


def test_a_version_that_was_never_or_is_no_longer_there_is_an_error(store: EmbeddingStore) -> None:
    table = put(store)

    with pytest.raises(EmbeddingTableError, match=r"version 99 .* attention_embeddings\[s\.jsonl\] again"):
        next(store.read(replace(table, version=99)))


@pytest.mark.parametrize("n_rows", [0, 9, 11])
def test_another_number_of_rows_than_recorded_is_an_error(store: EmbeddingStore, n_rows: int) -> None:
    table = replace(put(store), n_rows=n_rows)

    with pytest.raises(
        EmbeddingTableError,
        match=rf"gave 10 rows, recorded were {n_rows}; materialize attention_embeddings\[s\.jsonl\] again",
    ):
        list(store.read(table))


def test_another_dimension_than_recorded_is_an_error(store: EmbeddingStore) -> None:
    table = replace(put(store), dimension=8)

    with pytest.raises(EmbeddingTableError, match=r"materialize attention_embeddings\[s\.jsonl\] again"):
        list(store.read(table))


@pytest.mark.parametrize("damage", ["gone", "truncated"])
def test_damaged_data_files_are_an_error_that_names_shard_and_remedy(
    store: EmbeddingStore, damage: str
) -> None:
    table = put(store)
    for file in Path(store.folder.path, f"{table.table}.lance", "data").iterdir():
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:50])

    with pytest.raises(EmbeddingTableError, match=r"materialize attention_embeddings\[s\.jsonl\] again"):
        list(store.read(table))


def test_an_error_of_whoever_reads_is_not_taken_for_one_of_the_table(store: EmbeddingStore) -> None:
    table = put(store)

    def reading() -> Iterator[None]:
        for _ in store.read(table, batch_rows=3):
            raise RuntimeError("of the reader")
        yield

    with pytest.raises(RuntimeError, match=r"^of the reader$"):
        list(reading())


# Crashes

_WRITE_FOREVER = textwrap.dedent(
    """
    import json
    import sys
    from itertools import count

    import numpy as np
    from upath import UPath

    from scalselect_assets.resources.embedding_store import EmbeddingStore

    store = EmbeddingStore(UPath(sys.argv[1]), {})
    store._connect()  # imports LanceDB
    keys = [str(row) for row in range(2000)]
    for generation in count(int(input())):
        table = store.replace(
            "f1",
            "s.jsonl",
            dimension=256,
            rows=range(2000),
            sample_keys=keys,
            source_ids=keys,
            vectors=np.full((2000, 256), generation, np.float32),
            attributes={},
        )
        print(json.dumps(table.to_json()), flush=True)
    """
)


@pytest.mark.usefixtures("processes")
def test_a_writer_killed_at_any_moment_leaves_one_complete_generation(store: EmbeddingStore) -> None:
    delays = np.random.default_rng(20260211).uniform(0.0, 0.5, size=3)
    generation, latest = 0, 0
    with ExitStack() as running:
        writers = [running.enter_context(_writer(store)) for _ in delays]  # they start up side by side
        for writer, delay in zip(writers, delays, strict=True):
            start = generation + 1
            recorded = _killed_after(writer, start, delay)

            table = opened(store, table_name("f1", "s.jsonl"))
            stored = table.to_arrow()
            assert sorted(stored.column("row").to_pylist()) == list(range(2000))
            (generation,) = {int(value) for value in _distinct(stored.column("vector"))}
            # What the writer told of is there, and after it at most a commit that it did not live to tell of.
            assert generation - (start + len(recorded) - 1) in {0, 1}
            assert table.version - recorded[-1].version in {0, 1}
            assert recorded[0].version > latest
            read = np.concatenate([batch.vector for batch in store.read(recorded[-1])])
            assert (read == start + len(recorded) - 1).all()
            latest = table.version

    assert put(store, n_rows=3).version > latest
    shutil.rmtree(store.folder.path)  # each generation is 2 MB, and pytest keeps what a test leaves


def _writer(store: EmbeddingStore) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", _WRITE_FOREVER, str(store.folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def _killed_after(writer: subprocess.Popen, start: int, seconds: float) -> list[EmbeddingTable]:
    """What the writer told of until it was killed, ``seconds`` after the first commit."""
    writer.stdin.write(f"{start}\n")  # type: ignore[union-attr]
    lines = [writer.stdout.readline()]  # type: ignore[union-attr]
    time.sleep(seconds)
    writer.send_signal(signal.SIGKILL)
    lines += writer.stdout.read().splitlines()  # type: ignore[union-attr]
    assert writer.wait() == -signal.SIGKILL
    return [EmbeddingTable(**json.loads(line)) for line in lines]


def _distinct(vectors: pa.ChunkedArray) -> set[float]:
    return set(np.unique(vectors.combine_chunks().flatten().to_numpy()).tolist())


def test_a_first_write_that_was_cut_off_before_its_commit_does_not_stand_in_the_way(
    store: EmbeddingStore,
) -> None:
    table = put(store, seed=1)
    shutil.rmtree(Path(store.folder.path, f"{table.table}.lance", "_versions"))
    with pytest.raises(EmbeddingTableError, match=r"materialize attention_embeddings\[s\.jsonl\] again"):
        next(store.read(table))

    again = put(store, n_rows=3, seed=2)

    assert len(rows_of(store, again)) == 3
    assert opened(store, again.table).count_rows() == 3


def test_vectors_are_taken_by_position_from_the_recorded_version(store: EmbeddingStore) -> None:
    table = put(store, n_rows=10)
    put(store, n_rows=3, seed=5)
    taken = store.take(table, [9, 0, 4])
    assert sorted(map(tuple, taken)) == sorted(map(tuple, vectors_of(10)[[9, 0, 4]]))
    with pytest.raises(EmbeddingTableError, match=r"materialize attention_embeddings\[s\.jsonl\] again"):
        store.take(replace(table, version=99), [0])


def test_the_vectors_of_some_rows_come_in_the_order_that_is_asked_for(store: EmbeddingStore) -> None:
    rows = [30, 2, 17, 5, 90]  # rejected rows leave gaps, and nothing says that the table is in row order
    vectors = np.arange(20, dtype=np.float32).reshape(5, 4)
    table = store.replace(
        "model",
        "a shard",
        dimension=4,
        rows=rows,
        sample_keys=[f"key {row}" for row in rows],
        source_ids=[None] * 5,
        vectors=vectors,
        attributes={},
    )
    for wanted in ([90], [5, 30, 17], rows, sorted(rows)):
        got = store.read_vectors(table, wanted)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, vectors[[rows.index(row) for row in wanted]])
    assert store.read_vectors(table, []).shape == (0, 4)
    for missing in ([3], [90, 91], [-1]):
        with pytest.raises(EmbeddingTableError, match=f"it has no row {missing[-1]}"):
            store.read_vectors(table, missing)


# Damage that stays readable


def flip(folder: Path, value: bytes) -> None:
    """Change a bit where a table's data files hold a value."""
    found = False
    for path in sorted(folder.glob("data/*")):
        data = bytearray(path.read_bytes())
        if (place := data.find(value)) >= 0:
            data[place + len(value) - 1] ^= 1
            path.write_bytes(data)
            found = True
    assert found, f"no data file holds {value!r}"


READS: dict[str, Any] = {
    "read": lambda store, table: list(store.read(table)),
    "read_all": lambda store, table: store.read_all(table),
    "take": lambda store, table: store.take(table, [2, 3]),
    "read_vectors": lambda store, table: store.read_vectors(table, [103, 102]),
    "verify": lambda store, table: store.verify(table),
}


@pytest.mark.parametrize("read", READS)
def test_a_vector_that_changed_on_the_disk_is_an_error_that_names_row_shard_and_remedy(
    store: EmbeddingStore, read: str
) -> None:
    table = put(store)
    READS[read](store, table)
    flip(Path(store.location(table).path), vectors_of(10)[3].tobytes())
    with pytest.raises(EmbeddingTableError, match=r"row 103 is not what was written") as raised:
        READS[read](store, table)
    assert raised.value.shard == "s.jsonl"
    assert "materialize attention_embeddings[s.jsonl] again" in str(raised.value)
    store.take(table, [0, 1])  # rows beside it are good


def test_a_text_that_changed_on_the_disk_is_an_error_where_its_column_is_read(
    store: EmbeddingStore,
) -> None:
    texts = [f"the text of row {row} is one of a kind {row}" for row in range(10)]
    table = put(store, attributes={"text": pa.array(texts), "n": pa.array(range(10), pa.int32())})
    store.verify(table)
    flip(Path(store.location(table).path), b"the text of row 3")
    assert store.read_rows(table, ["n"]).num_rows == 10
    for read in (lambda: store.read_rows(table, ["text"]), lambda: store.verify(table)):
        with pytest.raises(EmbeddingTableError, match="column 'text' is not what was written"):
            read()


def test_a_table_from_before_there_were_hashes_is_read_as_it_is_and_verified_by_its_receipt(
    store: EmbeddingStore,
) -> None:
    table = put(store)
    before = rows_of(store, table)
    handle = opened(store, table.table)
    plain = handle.search().limit(None).to_arrow().drop_columns(["row_sha256"])
    metadata = {key: value for key, value in plain.schema.metadata.items() if b"column_sha256" not in key}
    handle = lancedb.connect(str(store.folder)).create_table(
        table.table, plain.replace_schema_metadata(metadata), mode="overwrite"
    )
    old = replace(table, version=handle.version)

    assert rows_of(store, old) == before
    assert store.read_vectors(old, [103]).tobytes() == vectors_of(10)[3].tobytes()
    store.verify(old)
    flip(Path(store.location(old).path), vectors_of(10)[3].tobytes())
    assert rows_of(store, old) != before
    with pytest.raises(EmbeddingTableError, match=r"its rows have hash .*, recorded was"):
        store.verify(old)
