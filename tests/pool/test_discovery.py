"""Which shards there are, which have changed, and which are still being written."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.pool import discovery
from scalselect_assets.pool.discovery import Discovery, discover, report_discovery, settled_discovery
from scalselect_assets.recording import records
from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.resources.sample_source import SampleSource
from scalselect_assets.resources.storage import StorageResource
from tests.conftest import png_bytes

OLD = 1_000_000_000.0
SETTLE = 60.0


class Pool:
    """A pool of shards whose files and images are old."""

    def __init__(self, root: Path, store: Path) -> None:
        self.root = root
        storage = StorageResource()
        self.source: SampleSource = storage.samples(str(root), None, str(store))
        self.artifacts: ArtifactStore = storage.artifacts(str(store))
        self.selection = Selection(name="s", source=str(root), store=str(store), target_model="m")
        self.age()

    def age(self) -> None:
        for path in self.root.rglob("*"):
            os.utime(path, (OLD, OLD))

    def discover(self) -> Discovery:
        return discover(self.source, self.artifacts, SETTLE)


@pytest.fixture
def pool(make_pool: Callable[..., Path], tmp_path: Path) -> Pool:
    return Pool(make_pool({"a.jsonl": 2, "b.jsonl": 2}), tmp_path / "store")


def test_a_shard_that_is_being_written_is_left_out_and_not_read(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pool.discover()
    (pool.root / "b.jsonl").write_text('{"half": ')
    (pool.root / "c.jsonl").write_text('{"half": ')
    monkeypatch.setattr(SampleSource, "index_shard", lambda *_: pytest.fail("read"))
    found = pool.discover()
    assert found.versions == {"a.jsonl": before.versions["a.jsonl"]}
    assert found.unsettled == ("b.jsonl", "c.jsonl")


def test_a_shard_whose_image_is_being_written_is_left_out(pool: Pool) -> None:
    pool.discover()
    (pool.root / "images" / "0.png").write_bytes(png_bytes(7)[:50])
    assert pool.discover().unsettled == ("a.jsonl",)


def test_a_time_in_the_future_is_a_wrong_clock_and_not_a_file_being_written(pool: Pool) -> None:
    later = time.time() + 86_400
    os.utime(pool.root / "a.jsonl", (later, later))
    assert pool.discover().unsettled == ()


def test_what_is_being_written_neither_comes_nor_goes(pool: Pool) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        assert report_discovery(pool.selection, instance, pool.discover()) == (["a.jsonl", "b.jsonl"], [])
        manifest = instance.fetch_observations(pool.selection.key("shard_manifest"), limit=5).records
        (pool.root / "b.jsonl").write_text('{"half": ')
        (pool.root / "c.jsonl").write_text('{"half": ')
        assert report_discovery(pool.selection, instance, pool.discover()) == ([], [])
        again = instance.fetch_observations(pool.selection.key("shard_manifest"), limit=5).records
        assert again == manifest
        pool.age()
        assert report_discovery(pool.selection, instance, pool.discover()) == (["c.jsonl"], [])


def test_a_refresh_waits_once_for_what_was_just_written(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    (pool.root / "a.jsonl").touch()
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        pool.age()

    monkeypatch.setattr(discovery.time, "sleep", sleep)
    assert set(settled_discovery(pool.source, pool.artifacts, SETTLE).versions) == {"a.jsonl", "b.jsonl"}
    assert settled_discovery(pool.source, pool.artifacts, SETTLE).unsettled == ()
    assert waited == [SETTLE]


def test_a_shard_that_goes_while_the_folder_is_looked_through_is_gone(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = pool.source.shard_keys()
    monkeypatch.setattr(SampleSource, "shard_keys", lambda _: listed)
    (pool.root / "a.jsonl").unlink()
    assert set(pool.discover().versions) == {"b.jsonl"}


def test_a_missing_image_root_is_not_taken_for_missing_shards(pool: Pool, tmp_path: Path) -> None:
    source = StorageResource().samples(str(pool.root), str(tmp_path / "unmounted"), str(tmp_path / "store"))
    with pytest.raises(FileNotFoundError, match="image root"):
        discover(source, pool.artifacts, SETTLE)


def test_many_new_shards_are_added_in_pieces(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite refuses a statement with more variables than its limit."""
    monkeypatch.setattr(records, "_SHARDS_AT_ONCE", 2)
    names = [f"{number}.jsonl" for number in range(5)]
    with dg.DagsterInstance.ephemeral() as instance:
        pieces: list[int] = []
        add = instance.add_dynamic_partitions

        def counted(name: str, keys: list[str]) -> None:
            pieces.append(len(keys))
            add(name, keys)

        monkeypatch.setattr(instance, "add_dynamic_partitions", counted)
        found = Discovery(dict.fromkeys(names, "v"), dict.fromkeys(names, 1))

        added, _ = report_discovery(pool.selection, instance, found)

        assert added == names
        assert pieces == [2, 2, 1]


def test_discovery_tells_what_is_passed_over(pool: Pool) -> None:
    (pool.root / "c.csv").touch()

    assert pool.discover().passed_over == {"other:.csv": {"count": 1, "examples": ["c.csv"]}}
