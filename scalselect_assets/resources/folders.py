"""Folders of files that are replaced as a whole, locally or in an object store.

A new folder is written beside the one in force and takes its place once everything is in it. On a local disk
that is two renames: between them there is no folder at all, never a mixture, and a reader that has opened a
file keeps it. An object store has no renames: the old objects are removed first, then the new ones are
copied, so a reader must compare sizes with those recorded for the files. Remains of a killed process beside
the folder are removed when the folder is written next. One writer per folder at a time; assets hold a lock.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from upath import UPath

from scalselect_assets.resources.artifacts import named
from scalselect_assets.resources.files import is_local

_MAKING = ".making-"
_REPLACED = ".replaced-"


@dataclass(slots=True)
class WrittenFile:
    """A file as its writer reports it; the file is not read back."""

    sha256: str
    bytes: int
    rows: int | None = None
    """Number of rows; None for a file that holds no rows."""


class HashedStream:
    """A binary file for writing only, in one pass, that hashes and counts the bytes written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._size = file, hashlib.sha256(), 0
        self.rows: int | None = None
        """Number of rows, set by the code that writes rows."""

    def write(self, data: bytes) -> int:
        """Append; returns the number of bytes."""
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Flush the file; some libraries flush their output."""
        self._file.flush()

    @property
    def closed(self) -> bool:
        """Whether the stream is closed; some libraries ask."""
        return self._file.closed

    def written(self) -> WrittenFile:
        """The size and hash of all bytes written so far."""
        return WrittenFile(self._digest.hexdigest(), self._size, self.rows)


@dataclass(frozen=True)
class NewFolder:
    """A folder that is being written, not in force yet.

    Attributes:
        target: Final location of the folder.
        files: Files written so far, by path below the folder.
    """

    target: UPath
    files: dict[str, WrittenFile] = field(default_factory=dict)

    @property
    def making(self) -> UPath:
        """The temporary location of the folder while it is written."""
        return _beside(self.target, _MAKING)

    def place(self, name: str) -> str:
        """The final location of the file ``name``, for use in other files: an absolute path or a URI."""
        return str(self.target / name)

    @contextmanager
    def stream(self, name: str) -> Iterator[HashedStream]:
        """Write the file ``name``, in constant memory; ``files`` names it once it is complete.

        Raises:
            ValueError: The name leads out of the folder, or there is such a file already.
            OSError: The file cannot be written; the message names it.
        """
        self._require_new(name)
        path = self.making / name
        if is_local(path):
            local = Path(path.path)
            local.parent.mkdir(parents=True, exist_ok=True)
            with named(path), local.open("xb") as file:
                stream = HashedStream(file)
                yield stream
                file.flush()
                os.fsync(file.fileno())
        else:
            with path.open("wb") as file:
                stream = HashedStream(file)
                yield stream
        self.files[name] = stream.written()

    def write(self, name: str, data: bytes, *, rows: int | None = None) -> None:
        """Write a small file; raises as ``stream``."""
        with self.stream(name) as file:
            file.write(data)
            file.rows = rows

    def hard_link(self, name: str, source: BinaryIO, known: WrittenFile) -> None:
        """Make ``name`` another name of an open local file, which ``known`` describes.

        The file is found by its descriptor: its path may lead to another file by now.

        Raises:
            ValueError: The name is refused as in ``stream``, or the folder is not local.
            OSError: The file system cannot (``EXDEV``: the two lie on different ones).
        """
        self._require_new(name)
        path = self.making / name
        if not is_local(path):
            raise ValueError(f"{self.target} is not on a local disk, and hard links are; copy the images")
        local = Path(path.path)
        local.parent.mkdir(parents=True, exist_ok=True)
        descriptor = source.fileno()
        # With a descriptor given, Python calls linkat(), which follows this link to the open file itself.
        os.link(f"/proc/self/fd/{descriptor}", local, src_dir_fd=descriptor, follow_symlinks=True)
        self.files[name] = known

    def path(self, name: str) -> UPath:
        """A written file, for reading it before the folder is in force."""
        return self.making / name

    def _require_new(self, name: str) -> None:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts:
            raise ValueError(f"{name!r} is no name of a file in {self.target}")
        if name in self.files:
            raise ValueError(f"{name!r} is in {self.target} already")


@contextmanager
def replaced_folder(target: UPath) -> Iterator[NewFolder]:
    """Write a folder that takes the place of ``target`` when the block ends without an error.

    Raises:
        OSError: The folder cannot be written. The old content of ``target`` is still there, unless the
            failure came while the folder took its place (see the module).
    """
    folder = NewFolder(target)
    remove_folder(folder.making)
    try:
        folder.making.mkdir(parents=True, exist_ok=True)
        yield folder
        _put_in_force(folder)
    except BaseException:
        remove_folder(folder.making)
        raise


def forget_folder(target: UPath) -> None:
    """Remove a folder that `replaced_folder` wrote, and the remains of a killed process beside it.

    Raises:
        OSError: Something cannot be removed.
    """
    for path in (target, _beside(target, _MAKING), _beside(target, _REPLACED)):
        remove_folder(path)


def remove_folder(path: UPath) -> None:
    """Remove a folder and everything in it, if it exists.

    Raises:
        OSError: Something in it cannot be removed.
    """
    if is_local(path):
        if Path(path.path).exists():
            shutil.rmtree(path.path)
    elif path.exists():
        path.fs.rm(path.path, recursive=True)


def _put_in_force(folder: NewFolder) -> None:
    if not is_local(folder.target):
        remove_folder(folder.target)
        for name in folder.files:
            source, place = folder.making / name, folder.target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            source.fs.mv(source.path, place.path)
        remove_folder(folder.making)
        return
    target, making = Path(folder.target.path), Path(folder.making.path)
    replaced = Path(_beside(folder.target, _REPLACED).path)
    remove_folder(UPath(replaced))
    if target.exists():
        target.rename(replaced)
    making.rename(target)
    remove_folder(UPath(replaced))


def _beside(target: UPath, prefix: str) -> UPath:
    return target.parent / f"{prefix}{target.name}"
