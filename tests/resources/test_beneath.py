"""Whatever is changed between two steps of a walk, what is read lies below the folder."""

import os
import pickle
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scalselect_assets.resources import beneath
from scalselect_assets.resources.beneath import Beneath, NoRegularFileError, OutsideError

INSIDE, OUTSIDE = b"inside", b"outside"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a file two folders down, and the same names outside of it."""
    for place, content in (("root", INSIDE), ("elsewhere", OUTSIDE)):
        (tmp_path / place / "a" / "b").mkdir(parents=True)
        (tmp_path / place / "a" / "b" / "x").write_bytes(content)
        (tmp_path / place / "a" / "deep").symlink_to("b")
    return tmp_path / "root"


def read(root: Path, path: str) -> bytes:
    with Beneath(str(root)).open(path) as file:
        return file.read()


def open_files() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


@contextmanager
def before_step(number: int, change: Callable[[], None]) -> Iterator[list[int]]:
    """Make a change right before the n-th system call that a walk makes; yields the calls made."""
    steps: list[int] = []

    def hooked(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            steps.append(len(steps))
            if len(steps) == number:
                change()
            return getattr(os, name)(*arguments, **options)

        return call

    names = ("open", "stat", "readlink", "fstat")
    everything = {name: getattr(os, name) for name in dir(os)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beneath, "os", SimpleNamespace(**everything | {name: hooked(name) for name in names}))
        yield steps


def _replace_by_link(path: Path, target: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    path.symlink_to(target)


CHANGES: dict[str, Callable[[Path], None]] = {
    "the file": lambda root: _replace_by_link(root / "a/b/x", root.parent / "elsewhere/a/b/x"),
    "its folder": lambda root: _replace_by_link(root / "a/b", root.parent / "elsewhere/a/b"),
    "the folder above": lambda root: _replace_by_link(root / "a", root.parent / "elsewhere/a"),
    "a link on the way": lambda root: _replace_by_link(root / "a/deep", root.parent / "elsewhere/a/b"),
    "a relative link": lambda root: _replace_by_link(root / "a/deep", Path("../../elsewhere/a/b")),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("path", ["a/b/x", "a/deep/x"])
def test_a_link_that_comes_between_any_two_steps_leads_nowhere(root: Path, what: str, path: str) -> None:
    with before_step(0, lambda: None) as steps:
        assert read(root, path) == INSIDE
    refused = 0
    for number in range(1, len(steps) + 2):
        copy = root.with_name(f"copy-{number}") / "root"
        shutil.copytree(root.parent / "elsewhere", copy.parent / "elsewhere", symlinks=True)
        shutil.copytree(root, copy, symlinks=True)
        with before_step(number, lambda copy=copy: CHANGES[what](copy)):  # type: ignore[misc]
            try:
                assert read(copy, path) == INSIDE
            except (OutsideError, FileNotFoundError):
                refused += 1
    assert refused or (what.endswith("link") and path == "a/b/x") or "link on" in what


def test_a_folder_that_was_open_before_is_not_entered_anew_through_a_link(root: Path) -> None:
    files = Beneath(str(root))
    with files.open("a/b/x") as file:
        assert file.read() == INSIDE
    (root / "a/b").rename(root / "moved")
    (root / "a/b").symlink_to(root.parent / "elsewhere/a/b")
    with files.open("a/b/x") as file:
        assert file.read() == INSIDE
    with pytest.raises(OutsideError):
        read(root, "a/b/x")


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("b/x", INSIDE),
        ("../a/b/x", INSIDE),
        ("deep/../b/x", INSIDE),
        ("{root}/a/b/x", INSIDE),
        ("{alias}/a/deep/x", INSIDE),
        ("../../root/a/b/x", INSIDE),
        ("../../elsewhere/../root/a/b/x", INSIDE),
        ("../../elsewhere/a/b/x", OutsideError),
        ("{root}/../elsewhere/a/b/x", OutsideError),
        ("/proc/self/environ", OutsideError),
        ("/", OutsideError),
        ("..", NoRegularFileError),
        ("../..", NoRegularFileError),
        ("b", NoRegularFileError),
        ("b/x/", NoRegularFileError),
        ("b/x/y", NotADirectoryError),
        ("not there", FileNotFoundError),
    ],
)
def test_links_are_followed_as_the_system_does_where_they_stay_below(
    root: Path, target: str, found: Any
) -> None:
    (root.parent / "alias").symlink_to(root)
    (root / "a/link").symlink_to(target.format(root=root, alias=root.parent / "alias"))
    if isinstance(found, bytes):
        assert read(root, "a/link") == found == (root / "a/link").read_bytes()
        return
    with pytest.raises(found):
        read(root, "a/link")


def test_links_in_a_circle_and_long_chains_of_links_end(root: Path) -> None:
    (root / "one").symlink_to("two")
    (root / "two").symlink_to("one")
    (root / "into").symlink_to("into/itself")
    for place in range(60):
        (root / f"chain{place + 1}").symlink_to(f"chain{place}")
    (root / "chain0").symlink_to("a/b/x")
    assert read(root, "chain30") == INSIDE
    for path in ("one", "into", "into/x", "chain60", "one/x"):
        with pytest.raises(OSError, match="Too many levels"):
            read(root, path)


def test_pipes_and_folders_are_refused_without_waiting(root: Path) -> None:
    os.mkfifo(root / "pipe")
    for path in ("pipe", "a", "a/", ".", "a/."):
        with pytest.raises(NoRegularFileError):
            read(root, path)


def test_a_file_that_becomes_a_pipe_is_refused_once_it_is_open(root: Path) -> None:
    def change() -> None:
        (root / "a/b/x").unlink()
        os.mkfifo(root / "a/b/x")

    with before_step(0, lambda: None) as steps:
        read(root, "a/b/x")
    with before_step(len(steps) - 1, change), pytest.raises(NoRegularFileError):
        read(root, "a/b/x")


def test_folders_that_are_open_are_few_and_closed_at_the_end(root: Path) -> None:
    before = open_files()
    files = Beneath(str(root))
    for number in range(50):
        (root / f"folder{number}").mkdir()
        (root / f"folder{number}" / "x").write_bytes(INSIDE)
        assert stat.S_ISREG(files.status(f"folder{number}/x").st_mode)
    assert len(open_files() - before) <= 20
    for _ in range(100):
        with pytest.raises(FileNotFoundError):
            files.status("a/b/../not-there/x")
    del files
    assert open_files() <= before


def test_another_process_opens_folders_of_its_own(root: Path) -> None:
    files = Beneath(str(root))
    files.status("a/b/x")
    with pickle.loads(pickle.dumps(files)).open("a/b/x") as file:
        assert file.read() == INSIDE
