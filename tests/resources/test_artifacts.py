"""What is written is read back with its header, and a file is old or new, nothing between."""

import io
import itertools
import json
import os
import stat
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import save
from upath import UPath

from scalselect_assets.resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore

HEADER = {"data_version": "1", "provenance": '{"shard": "한 / \\n"}', "empty": ""}
FRAME = pl.DataFrame(
    {
        "row": [0, 1, 2],
        "sample_key": ["a", "한\n'\"", None],
        "leverage": [0.1, -0.0, float("nan")],
        "images": [["a.png"], [], None],
    },
    schema_overrides={"row": pl.Int64, "images": pl.List(pl.String)},
)
HOSTILE = [
    "a/b",
    "a_2fb",
    "a\\b",
    "..",
    ".",
    "../../escaped",
    "/etc/escaped",
    "'; DROP TABLE x; --",
    '"quoted"',
    "한국/부분",
    "100%",
    "a%2fb",
    "new\nline",
    " ",
    "~",
    "$HOME/{x}*?",
    "x" * 300,
    "x" * 299 + "y",
]

WRITERS: dict[str, Callable[[ArtifactStore, int], Any]] = {
    "frame": lambda store, n: store.write_frame("asset", pl.DataFrame({"n": [n]}), {"n": str(n)}, "a/b"),
    "arrays": lambda store, n: store.write_arrays("asset", {"n": np.array(n)}, {"n": str(n)}, "a/b"),
    "json": lambda store, n: store.write_json("asset", {"n": n}, "a/b"),
    "text": lambda store, n: store.write_text(store.path("asset", "a/b", suffix=".txt"), [str(n)] * 3),
}


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtifactStore]:
    """An empty store on this machine, and one behind fsspec as an object store is."""
    if request.param == "local":
        yield ArtifactStore(UPath(tmp_path / "store"))
        return
    root = UPath(f"memory://{tmp_path.name}-store")
    yield ArtifactStore(root)
    if root.exists():
        root.fs.rm(root.path, recursive=True)


@pytest.fixture
def local(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(UPath(tmp_path / "store"))


def contents(store: ArtifactStore) -> dict[str, bytes]:
    """Every file of the store, hidden ones too."""
    return {str(path): path.read_bytes() for path in store.root.rglob("*") if path.is_file()}


# Round trips


@pytest.mark.parametrize("shard", [None, "한 / shard.jsonl"])
def test_a_frame_comes_back_with_its_header(store: ArtifactStore, shard: str | None) -> None:
    path, n_bytes = store.write_frame("raw_samples", FRAME, HEADER, shard)

    frame, header = store.read_frame("raw_samples", shard)

    assert frame.equals(FRAME)
    assert frame.schema == FRAME.schema
    assert header.items() >= HEADER.items()
    assert store.read_header("raw_samples", shard) == header
    assert path == store.path("raw_samples", shard, suffix=".parquet")
    assert n_bytes == len(path.read_bytes())


def test_a_frame_without_rows_keeps_its_schema_and_header(store: ArtifactStore) -> None:
    store.write_frame("raw_samples", FRAME.clear(), HEADER, "s")

    frame, header = store.read_frame("raw_samples", "s")

    assert (frame.height, frame.schema) == (0, FRAME.schema)
    assert header.items() >= HEADER.items()


def test_arrays_come_back_bit_for_bit_with_their_header(store: ArtifactStore) -> None:
    values = np.random.default_rng(0).standard_normal((5, 4))
    values[0] = [-0.0, np.inf, np.nan, 5e-324]
    arrays = {
        "scalar": np.array(0.1),
        "count": np.int64(2**62),
        "by column": np.asfortranarray(values),
        "transposed": values.T,
        "every other": values[::2, ::-1],
        "single": values.astype(np.float32),
        "no rows": np.zeros((0, 4)),
        "flags": np.array([True, False]),
    }

    path, n_bytes = store.write_arrays("embedding_moments", arrays, HEADER, "s")
    back, header = store.read_arrays("embedding_moments", "s")

    assert header == HEADER
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape), name
        assert back[name].tobytes() == array.tobytes(), name
    assert n_bytes == len(path.read_bytes())


def test_json_comes_back(store: ArtifactStore) -> None:
    value = {"한": [1, 0.1, None, True, "a\n\u2028\"'"], "nested": {"": {}}}

    path, n_bytes = store.write_json("selected_subset", value, "s")

    assert store.read_json("selected_subset", "s") == value
    assert n_bytes == len(path.read_bytes())
    assert "한" in path.read_text(encoding="utf-8"), "a reader can search it"


def test_text_is_the_pieces_one_after_the_other(store: ArtifactStore) -> None:
    path = store.path("training_dataset", "train", suffix=".json")

    n_bytes = store.write_text(path, iter(["[\n", "", "한\r\n", "]"]))

    assert path.read_bytes() == "[\n한\r\n]".encode()
    assert n_bytes == len(path.read_bytes())
    assert store.write_text(path, []) == 0
    assert path.read_bytes() == b""


def test_text_is_streamed(local: ArtifactStore) -> None:
    mebibyte, n_pieces = 2**20, 48
    pieces = (f"{number:08}" * (mebibyte // 8) for number in range(n_pieces))

    tracemalloc.start()
    n_bytes = local.write_text(local.path("training_dataset", suffix=".json"), pieces)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert n_bytes == n_pieces * mebibyte
    assert peak < n_bytes / 4


# Replacing


@pytest.mark.parametrize("kind", WRITERS)
def test_a_rerun_replaces(store: ArtifactStore, kind: str) -> None:
    WRITERS[kind](store, 1)
    first = contents(store)

    WRITERS[kind](store, 1)
    again = contents(store)
    WRITERS[kind](store, 2)
    changed = contents(store)

    assert len(first) == 1
    assert again == first
    assert changed.keys() == first.keys()
    assert changed != first


def test_a_smaller_frame_leaves_nothing_of_the_larger_one(store: ArtifactStore) -> None:
    store.write_frame("raw_samples", FRAME, {"old": "1"}, "s")
    store.write_frame("raw_samples", FRAME.head(1), {"new": "1"}, "s")

    frame, header = store.read_frame("raw_samples", "s")

    assert frame.equals(FRAME.head(1))
    assert "old" not in header
    assert "old" not in store.read_header("raw_samples", "s")


def test_an_output_exists_once_it_is_written(store: ArtifactStore) -> None:
    assert not store.exists("asset", "a/b", suffix=".json")

    WRITERS["json"](store, 1)

    assert store.exists("asset", "a/b", suffix=".json")
    assert not store.exists("asset", "a/b", suffix=".parquet")
    assert not store.exists("asset", suffix=".json")


def test_whoever_reads_while_a_file_is_replaced_reads_the_old_one_to_its_end(local: ArtifactStore) -> None:
    path = local.path("training_dataset", suffix=".json")
    local.write_text(path, ["old " * 100_000])

    with path.open("rb") as reader:
        begin = reader.read(4)
        local.write_text(path, ["new"])
        rest = reader.read()

    assert begin + rest == b"old " * 100_000
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("kind", WRITERS)
def test_whoever_the_umask_lets_read_may_read_the_files(local: ArtifactStore, kind: str) -> None:
    before = os.umask(0o027)
    try:
        WRITERS[kind](local, 1)
    finally:
        os.umask(before)

    (file,) = contents(local)
    assert stat.S_IMODE(Path(file).stat().st_mode) == 0o640


# Failures while writing


@pytest.mark.parametrize("existing", [True, False])
def test_text_that_fails_on_the_way_leaves_the_old_file_and_no_other(
    store: ArtifactStore, existing: bool
) -> None:
    path = store.path("training_dataset", "train", suffix=".json")
    if existing:
        store.write_text(path, ["old"])

    def failing() -> Iterator[str]:
        yield "new " * 1_000_000
        raise LookupError("row 7 is gone")

    with pytest.raises(LookupError, match="row 7"):
        store.write_text(path, failing())

    assert contents(store) == ({str(path): b"old"} if existing else {})


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_disk_that_is_full_leaves_the_old_file_and_no_other(
    local: ArtifactStore, monkeypatch: pytest.MonkeyPatch, kind: str, existing: bool
) -> None:
    if existing:
        WRITERS[kind](local, 1)
    before = contents(local)

    def full(_file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[kind](local, 2)

    assert contents(local) == before


def test_an_interrupt_while_writing_leaves_the_old_file_and_no_other(
    local: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS["json"](local, 1)
    before = contents(local)

    def interrupted(_file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        WRITERS["json"](local, 2)

    assert contents(local) == before


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_cannot_take_its_place_is_not_left_over(local: ArtifactStore, kind: str) -> None:
    for suffix in (".parquet", ".safetensors", ".json", ".txt"):
        local.path("asset", "a/b", suffix=suffix).mkdir(parents=True)

    with pytest.raises(OSError, match="asset"):
        WRITERS[kind](local, 1)

    assert contents(local) == {}


def test_what_cannot_be_written_as_json_leaves_the_old_file(store: ArtifactStore) -> None:
    WRITERS["json"](store, 1)
    before = contents(store)

    with pytest.raises(TypeError, match="not JSON serializable"):
        store.write_json("asset", {"n": object()}, "a/b")

    assert contents(store) == before


# Missing and damaged files

READERS: dict[str, tuple[str, str, Callable[[ArtifactStore], Any]]] = {
    "frame": ("frame", ".parquet", lambda store: store.read_frame("asset", "a/b")),
    "header": ("frame", ".parquet", lambda store: store.read_header("asset", "a/b")),
    "arrays": ("arrays", ".safetensors", lambda store: store.read_arrays("asset", "a/b")),
    "json": ("json", ".json", lambda store: store.read_json("asset", "a/b")),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_missing_output_is_an_error_that_names_asset_shard_and_remedy(
    store: ArtifactStore, reader: str
) -> None:
    _, suffix, read = READERS[reader]

    with pytest.raises(
        ArtifactMissingError, match=r"^asset\[a/b\] is not in the store .*materialize it"
    ) as e:
        read(store)

    assert str(store.path("asset", "a/b", suffix=suffix)) in str(e.value)
    assert isinstance(e.value, FileNotFoundError)


def test_a_missing_output_of_all_shards_names_its_asset_alone(store: ArtifactStore) -> None:
    with pytest.raises(ArtifactMissingError, match=r"^subspace_basis is not in the store"):
        store.read_arrays("subspace_basis")


@pytest.mark.parametrize("reader", READERS)
def test_another_shard_or_asset_does_not_stand_in_for_a_missing_one(
    store: ArtifactStore, reader: str
) -> None:
    kind, _, read = READERS[reader]
    WRITERS[kind](store, 1)
    read(store)

    with pytest.raises(ArtifactMissingError, match=r"^asset\[a/b\]"):
        read(ArtifactStore(store.root / "asset"))


@pytest.mark.parametrize("reader", READERS)
def test_a_truncated_file_is_an_error_that_names_the_file_and_the_remedy(
    store: ArtifactStore, reader: str
) -> None:
    kind, suffix, read = READERS[reader]
    WRITERS[kind](store, 1)
    path = store.path("asset", "a/b", suffix=suffix)
    whole = path.read_bytes()

    for length in {0, 1, 4, 8, 9, len(whole) // 4, len(whole) // 2, len(whole) - 8, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactCorruptError, match=r"^asset\[a/b\] .*materialize it again$") as e:
            read(store)
        assert str(path) in str(e.value)


@pytest.mark.parametrize("reader", READERS)
def test_bytes_that_are_something_else_are_an_error(store: ArtifactStore, reader: str) -> None:
    _, suffix, read = READERS[reader]
    path = store.path("asset", "a/b", suffix=suffix)
    path.parent.mkdir(parents=True)

    for data in (b"\0" * 100, b"\xff" * 100, b"PAR1" + b"\xff" * 100 + b"PAR1", b'{"n": "caf\xe9"}'):
        path.write_bytes(data)
        with pytest.raises(ArtifactCorruptError, match=r"asset\[a/b\]"):
            read(store)


HEADER_BYTES = 100


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bits", [0xFF, 0x01, 0x20])
def test_a_changed_byte_is_an_error_or_changes_nothing_of_what_is_read(
    local: ArtifactStore, reader: str, bits: int
) -> None:
    kind, suffix, read = READERS[reader]
    WRITERS[kind](local, 1)
    path = local.path("asset", "a/b", suffix=suffix)
    whole, right = path.read_bytes(), repr(read(local))

    refused = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= bits
        path.write_bytes(damaged)
        try:
            found = read(local)
        except ArtifactCorruptError:
            refused += 1
            continue
        if reader == "json":
            found = {"n": found["n"]}  # beside it may stand the hash, where its own name was changed
        assert repr(found) == right
    parts = {"header": HEADER_BYTES, "json": len(whole) - len("payload_sha256")}
    assert refused >= parts.get(reader, len(whole))


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors", ".json"])
def test_a_file_from_before_there_were_hashes_is_read_as_it_is(local: ArtifactStore, suffix: str) -> None:
    path = Path(local.path("asset", "s", suffix=suffix).path)
    path.parent.mkdir(parents=True)
    if suffix == ".json":
        path.write_text(json.dumps({"n": 1}))
        assert local.read_json("asset", "s") == {"n": 1}
    elif suffix == ".parquet":
        FRAME.write_parquet(path, metadata=HEADER)
        frame, header = local.read_frame("asset", "s")
        assert frame.equals(FRAME, null_equal=True)
        assert header == HEADER == local.read_header("asset", "s")
    else:
        path.write_bytes(save({"n": np.arange(3)}, metadata=HEADER))
        arrays, header = local.read_arrays("asset", "s")
        assert arrays["n"].tolist() == [0, 1, 2]
        assert header == HEADER == local.read_header("asset", "s", suffix=suffix)


def test_content_that_holds_the_file_s_own_places_is_told_from_them(local: ArtifactStore) -> None:
    blank = "0" * 64
    frame = pl.DataFrame({"payload_sha256": [blank, "payload_sha256"]})
    local.write_frame("asset", frame, {"payload": blank}, "s")
    assert local.read_frame("asset", "s")[0].equals(frame)
    value = {"a": blank, "b": f'"payload_sha256": "{blank}"'}
    local.write_json("asset", value, "s")
    assert local.read_json("asset", "s") == value


def test_what_is_recorded_of_a_file_holds_no_hash_of_it(local: ArtifactStore) -> None:
    local.write_frame("asset", FRAME, HEADER, "s")
    local.write_arrays("asset", {"n": np.arange(3)}, HEADER, "s")
    for suffix in (".parquet", ".safetensors"):
        assert local.read_header("asset", "s", suffix=suffix) == HEADER


# Hostile names


def test_every_shard_has_a_file_of_its_own_below_its_assets_folder(
    store: ArtifactStore, tmp_path: Path
) -> None:
    for shard in HOSTILE:
        store.write_json("asset", {"shard": shard}, shard)
        store.write_frame("asset", pl.DataFrame({"shard": [shard]}), {"shard": shard}, shard)
        store.write_arrays("asset", {"n": np.array(len(shard))}, {"shard": shard}, shard)

    folder = store.root / "asset"
    files = [path for path in store.root.rglob("*") if path.is_file()]
    assert len(files) == 3 * len(HOSTILE)
    assert {path.parent for path in files} == {folder}
    assert all(path.name.isascii() and len(path.name) < 255 for path in files)
    for shard in HOSTILE:
        assert store.read_json("asset", shard) == {"shard": shard}
        assert store.read_frame("asset", shard)[0]["shard"].to_list() == [shard]
        assert store.read_header("asset", shard)["shard"] == shard
        assert store.read_arrays("asset", shard)[1] == {"shard": shard}
    outside = [
        path for path in tmp_path.rglob("*") if path.is_file() and tmp_path / "store" not in path.parents
    ]
    assert outside == []


def test_no_two_hostile_names_meet() -> None:
    store = ArtifactStore(UPath("/store"))

    paths = {shard: store.path("asset", shard, suffix=".json") for shard in HOSTILE}

    for (one, path), (other, other_path) in itertools.combinations(paths.items(), 2):
        assert path != other_path, (one, other)


def test_a_store_may_lie_under_a_hostile_name(tmp_path: Path) -> None:
    store = ArtifactStore(UPath(tmp_path / "한 글 100%20 #?'\""))

    for write in WRITERS.values():
        write(store, 1)

    assert store.read_json("asset", "a/b") == {"n": 1}
    assert store.read_frame("asset", "a/b")[0].equals(pl.read_parquet(io.BytesIO(_only(store, ".parquet"))))
    assert json.loads(_only(store, ".json"))["n"] == 1


def _only(store: ArtifactStore, suffix: str) -> bytes:
    (data,) = (data for name, data in contents(store).items() if name.endswith(suffix))
    return data


def test_an_output_that_is_renamed_is_found_under_its_new_name_only(store: ArtifactStore) -> None:
    for n, shard in enumerate(("a/b", "x" * 300)):
        store.write_arrays("asset", {"n": np.array(n)}, {"n": str(n)}, shard)
        store.rename("asset", shard, "aside", f"{shard}@1", suffix=".safetensors")
        assert not store.exists("asset", shard, suffix=".safetensors")
        assert store.read_arrays("aside", f"{shard}@1")[0]["n"] == n
    assert len(store.paths("aside", suffix=".safetensors")) == 2
    assert store.paths("asset", suffix=".safetensors") == []
    assert store.paths("never", suffix=".safetensors") == []


def test_renaming_replaces_what_has_the_name(store: ArtifactStore) -> None:
    for n in (1, 2):
        store.write_arrays("asset", {"n": np.array(n)}, {}, str(n))
    store.rename("asset", "1", "asset", "2", suffix=".safetensors")
    assert store.read_arrays("asset", "2")[0]["n"] == 1


def test_some_columns_are_read_with_the_header(store: ArtifactStore) -> None:
    store.write_frame("asset", FRAME, HEADER)
    frame, header = store.read_frame("asset", columns=["leverage"])
    assert frame.columns == ["leverage"]
    assert header.items() >= HEADER.items()
