"""A URI names the same place wherever the process runs, and local and remote differ in nothing else."""

import os
from pathlib import Path

import pytest
from upath import UPath

from scalselect_assets.resources.files import is_local
from scalselect_assets.resources.storage import StorageResource
from tests.conftest import sharegpt_row, write_lines


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["store", "./store", "a/../store", "한국 100%/st#re?", "file.d/store"])
def test_a_relative_path_starts_from_where_the_process_is(tmp_path: Path, name: str) -> None:
    path = StorageResource().path(name)

    assert is_local(path)
    assert Path(path.path).is_absolute()
    assert os.path.normpath(path.path) == os.path.normpath(tmp_path / name)


@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_absolute_paths_and_file_uris_are_the_same_place(tmp_path: Path, scheme: str) -> None:
    path = StorageResource().path(f"{scheme}{tmp_path}/store")

    assert is_local(path)
    assert path.path == str(tmp_path / "store")
    assert path == StorageResource().path("store")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    assert StorageResource().path("~/store").path == str(tmp_path / "home" / "store")


def test_local_locations_get_no_options_of_object_stores(tmp_path: Path) -> None:
    storage = StorageResource(fsspec_options={"token": "secret"}, lance_options={"region": "here"})

    assert not storage.path(str(tmp_path)).storage_options
    assert storage.embeddings(str(tmp_path)).storage_options == {}


def test_a_remote_uri_stays_remote_and_gets_the_options(tmp_path: Path) -> None:
    storage = StorageResource(fsspec_options={"token": "secret"}, lance_options={"region": "here"})

    path = storage.path("memory://pool/store")

    assert not is_local(path)
    assert (path.protocol, path.path) == ("memory", "/pool/store")
    assert path.storage_options == {"token": "secret"}
    assert storage.embeddings("memory://pool/store").storage_options == {"region": "here"}
    assert str(storage.embeddings("memory://pool/store").folder) == "memory://pool/store/lance"
    assert list(tmp_path.iterdir()) == []


def test_files_and_tables_of_a_store_lie_below_it(tmp_path: Path) -> None:
    storage = StorageResource()

    storage.artifacts("store").write_json("facts", {"n": 1}, "a/b")

    (file,) = (path for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert storage.artifacts(f"file://{tmp_path}/store").read_json("facts", "a/b") == {"n": 1}
    assert file.parent == tmp_path / "store" / "facts"
    assert storage.embeddings("store").folder == UPath(tmp_path / "store" / "lance")


@pytest.mark.parametrize("store", ["pool/store", "./pool/../pool/store", "file://{here}/pool/store"])
def test_a_store_inside_the_pool_is_not_part_of_the_pool(tmp_path: Path, store: str) -> None:
    for name in ("a.json", "store/facts/b.json", "stores/c.jsonl"):
        write_lines(tmp_path / "pool" / name, [sharegpt_row("x.png")])

    samples = StorageResource().samples("pool", None, store.format(here=tmp_path))

    assert list(samples.shard_keys()) == ["a.json", "stores/c.jsonl"]


def test_a_pool_is_read_against_the_image_root_that_is_declared(tmp_path: Path) -> None:
    write_lines(tmp_path / "pool" / "sub" / "a.jsonl", [sharegpt_row("x.png")])
    (tmp_path / "pool" / "x.png").write_bytes(b"root")
    (tmp_path / "pool" / "sub" / "x.png").write_bytes(b"sub")

    images = {
        root: StorageResource().samples("pool", root, "store").read_shard("sub/a.jsonl")
        for root in (None, "./pool")
    }

    assert [next(iter(rows)).image_paths for rows in images.values()] == [("sub/x.png",), ("x.png",)]


def test_a_remote_pool_is_listed_without_its_store(tmp_path: Path) -> None:
    root = UPath(f"memory://{tmp_path.name}/pool")
    for name in ("a.json", "store/b.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("[]")

    samples = StorageResource().samples(str(root), None, f"{root}/store")

    assert list(samples.shard_keys()) == ["a.json"]
