"""A folder is the old one or the new one, never a mixture, and what was written is known without reading."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from upath import UPath

from scalselect_assets.resources.folders import WrittenFile, remove_folder, replaced_folder


@pytest.fixture(params=["local", "object store"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> UPath:
    if request.param == "local":
        return UPath(tmp_path / "store" / "export")
    return UPath(f"memory://{tmp_path.name}/export")


def content(folder: UPath) -> dict[str, bytes]:
    found = folder.fs.find(folder.path)
    return {path.removeprefix(folder.path).lstrip("/"): folder.fs.cat_file(path) for path in found}


def test_a_folder_replaces_the_last_one_whole(target: UPath) -> None:
    for files in ({"a": b"1", "deep/b": b"2"}, {"a": b"3"}):
        with replaced_folder(target) as folder:
            for name, data in files.items():
                folder.write(name, data, rows=1)
            assert folder.place("a") == str(target / "a")
        assert content(target) == files
        assert folder.files == {
            name: WrittenFile(hashlib.sha256(data).hexdigest(), len(data), 1) for name, data in files.items()
        }
        assert [path.name for path in target.parent.iterdir()] == ["export"]


def test_an_error_leaves_the_last_one_and_nothing_beside(target: UPath) -> None:
    with replaced_folder(target) as folder:
        folder.write("a", b"1")

    def fail() -> None:
        with replaced_folder(target) as folder, folder.stream("a") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert content(target) == {"a": b"1"}
    assert [path.name for path in target.parent.iterdir()] == ["export"]


def test_what_a_killed_process_left_is_removed(target: UPath) -> None:
    for left in (".making-export", ".replaced-export"):
        (target.parent / left).mkdir(parents=True, exist_ok=True)
        (target.parent / left / "stale").write_bytes(b"0")
    with replaced_folder(target) as folder:
        folder.write("a", b"1")
    assert content(target) == {"a": b"1"}
    assert not (target.parent / ".making-export").exists()


def test_streams_count_what_goes_through(target: UPath) -> None:
    with replaced_folder(target) as folder:
        with folder.stream("a") as file:
            assert file.write(b"123") == 3
            assert file.tell() == 3
            file.write(b"4")
        assert folder.path("a").read_bytes() == b"1234"
        assert folder.files["a"].bytes == 4
    remove_folder(target)
    assert not target.exists()


@pytest.mark.parametrize("name", ["", "/absolute", "../out", "deep/../../out", "there"])
def test_names_stay_in_the_folder_and_are_written_once(target: UPath, name: str) -> None:
    with replaced_folder(target) as folder:
        folder.write("there", b"1")
        with pytest.raises(ValueError, match="is"):
            folder.write(name, b"2")


def test_a_hard_link_is_the_file_itself(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"1")
    known = WrittenFile(hashlib.sha256(b"1").hexdigest(), 1)
    with source.open("rb") as file, replaced_folder(UPath(tmp_path / "export")) as folder:
        folder.hard_link("deep/link", file, known)
        with pytest.raises(ValueError, match="is in"):
            folder.hard_link("deep/link", file, known)
    assert (tmp_path / "export" / "deep" / "link").stat().st_ino == source.stat().st_ino
    with (
        source.open("rb") as file,
        pytest.raises(ValueError, match="copy the images"),
        replaced_folder(UPath(f"memory://{tmp_path.name}/linked")) as remote,
    ):
        remote.hard_link("link", file, known)


def test_a_hard_link_is_to_the_open_file_whatever_its_name_leads_to_by_then(tmp_path: Path) -> None:
    source, secret = tmp_path / "source", tmp_path / "secret"
    source.write_bytes(b"1")
    secret.write_bytes(b"2")
    known = WrittenFile(hashlib.sha256(b"1").hexdigest(), 1)
    with source.open("rb") as file, replaced_folder(UPath(tmp_path / "export")) as folder:
        source.rename(tmp_path / "moved")
        source.symlink_to(secret)
        folder.hard_link("link", file, known)
    assert (tmp_path / "export" / "link").read_bytes() == b"1"
    assert (tmp_path / "export" / "link").stat().st_ino == (tmp_path / "moved").stat().st_ino


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    def write(name: str) -> Callable[[], None]:
        def do() -> None:
            with replaced_folder(UPath(tmp_path / "export")) as folder:
                folder.write(name, b"1")

        return do

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*big'"):
            write("big")()
    assert list(tmp_path.iterdir()) == []
