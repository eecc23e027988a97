"""Access to files below a folder that never leaves it, even if the folder changes meanwhile.

Checking a path and then opening it are two steps, and between them a file can become a link that leads
elsewhere. Here a path is opened one component at a time, each below the one before and none through a link;
a link's text is read and walked in the same way, from the link's own folder. So every file is reached only
through folders below the root. Links that stay below it are followed, as the system follows them.
Costs: a few system calls for each folder, which is kept open for the next files in it.
"""

import errno
import os
import posixpath
import stat
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import BinaryIO

_FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
_FILE = (
    os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
)  # opening a pipe must not wait for a writer
_IS_A_LINK = (errno.ELOOP, errno.ENOTDIR)  # or a file, where a folder is wanted
_MAX_LINKS = 40  # as the Linux kernel allows
_FOLDERS_OPEN = 16
_LONGEST_PATH = 4096  # of the system; a longer path names nothing


class OutsideError(Exception):
    """A path, or a link on it, leads out of the folder; nothing outside was opened."""


class NoRegularFileError(Exception):
    """A path leads to a folder, a pipe or a device."""


@dataclass(frozen=True, slots=True)
class _Folder:
    """An open folder, and the names that lead to it from the root, none of which is a link."""

    descriptor: int
    names: tuple[str, ...]


class Beneath:
    """The files below one folder of this machine.

    Keeps some folders open for as long as it lives: make one for each pass over a folder. Not for several
    threads at once.
    """

    def __init__(self, folder: str) -> None:
        """Take an absolute path; the folder is opened when the first file is asked for.

        Links on the way to the folder itself are followed, because the user declared that path.
        """
        self._path = posixpath.normpath(folder)
        self._folders: OrderedDict[tuple[str, ...], _Folder] = OrderedDict()
        self._root: int | None = None
        self._open: set[int] = set()
        weakref.finalize(self, _close, self._open)

    def __reduce__(self) -> tuple[type["Beneath"], tuple[str]]:
        """Pickle the path only: in another process, the open descriptors would mean other files."""
        return Beneath, (self._path,)

    def status(self, path: str) -> os.stat_result:
        """The status of the regular file at a relative path, from the system.

        Raises:
            OutsideError: The path leads out of the folder.
            NoRegularFileError: The path leads to something other than a regular file.
            OSError: There is no such file, its links go in circles, or the system cannot say.
        """
        return self._find(path)[2]

    def open(self, path: str) -> BinaryIO:
        """Open the regular file at a relative path for reading; raises as ``status``."""
        for _ in range(_MAX_LINKS):
            folder, name, _ = self._find(path)
            try:
                descriptor = os.open(name, _FILE, dir_fd=folder.descriptor)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    continue  # it has become a link since it was looked at
                raise OSError(error.errno, error.strerror, path) from error
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return os.fdopen(descriptor, "rb")
            os.close(descriptor)
            raise NoRegularFileError(path)
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)

    def _find(self, path: str) -> tuple[_Folder, str, os.stat_result]:
        """The folder of a file, its name in it, and its status. The name was no link when it was checked."""
        names = tuple(path.split("/"))
        if len(path) > _LONGEST_PATH:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path[:200])
        for _ in range(_MAX_LINKS):
            *parents, name = names
            if name in ("", ".", ".."):
                raise NoRegularFileError(path)
            folder = self._folder(tuple(parents))
            try:
                status = os.stat(name, dir_fd=folder.descriptor, follow_symlinks=False)
                if not stat.S_ISLNK(status.st_mode):
                    break
                names = self._behind_link(folder, name)
            except OSError as error:
                raise OSError(error.errno, error.strerror, path) from error
        else:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        if not stat.S_ISREG(status.st_mode):
            raise NoRegularFileError(path)
        return folder, name, status

    def _folder(self, names: tuple[str, ...]) -> _Folder:
        """The open folder at a path; it stays open for a while."""
        if names in self._folders:
            self._folders.move_to_end(names)
            return self._folders[names]
        folder = self._walk(names)
        self._folders[names] = folder
        self._open.add(folder.descriptor)
        if len(self._folders) > _FOLDERS_OPEN:
            _, oldest = self._folders.popitem(last=False)
            self._open.discard(oldest.descriptor)
            os.close(oldest.descriptor)
        return folder

    def _walk(self, names: tuple[str, ...]) -> _Folder:
        """Open a folder, component by component."""
        pending, n_links = list(reversed(names)), 0
        way: list[_Folder] = []  # from the root to where the walk is, for the way back up
        try:
            while pending:
                name = pending.pop()
                if name in ("", "."):
                    continue
                if name == "..":
                    if way:
                        os.close(way.pop().descriptor)
                        continue
                    above = posixpath.join(posixpath.dirname(self._real_path()), *reversed(pending))
                    pending = list(reversed(self._below_root(above)))
                    n_links += 1
                else:
                    here = way[-1] if way else _Folder(self._root_descriptor(), ())
                    try:
                        descriptor = os.open(name, _FOLDER, dir_fd=here.descriptor)
                        way.append(_Folder(descriptor, (*here.names, name)))
                        continue
                    except OSError as error:
                        if error.errno not in _IS_A_LINK:
                            raise
                        target = _link_or_raise(name, here.descriptor, error)
                    n_links += 1
                    if target.startswith("/"):
                        while way:
                            os.close(way.pop().descriptor)
                        target = "/".join(self._below_root(target))
                    pending += reversed(target.split("/"))
                if n_links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            return way.pop() if way else _Folder(os.dup(self._root_descriptor()), ())
        finally:
            for folder in way:
                os.close(folder.descriptor)

    def _behind_link(self, folder: _Folder, name: str) -> tuple[str, ...]:
        """The path, as names from the root, that a link in a folder stands for."""
        target = os.readlink(name, dir_fd=folder.descriptor)
        if target.startswith("/"):
            return self._below_root(target)
        return (*folder.names, *target.split("/"))

    def _below_root(self, absolute: str) -> tuple[str, ...]:
        """An absolute path as names below the root, whichever way it names the root.

        The result is only names, which are then walked like any others.
        """
        for root, path in (
            (self._path, posixpath.normpath(absolute)),
            (self._real_path(), os.path.realpath(absolute)),
        ):
            if posixpath.join(path, "").startswith(below := posixpath.join(root, "")):
                return tuple(path.removeprefix(root if path == root else below).split("/"))
        raise OutsideError(absolute)

    def _real_path(self) -> str:
        return os.path.realpath(self._path)

    def _root_descriptor(self) -> int:
        if self._root is None:
            self._root = os.open(self._path, _FOLDER & ~os.O_NOFOLLOW)
            self._open.add(self._root)
        return self._root


def _link_or_raise(name: str, folder: int, error: OSError) -> str:
    """The text of a link; raises ``error`` if the name is no link."""
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError as no_link:
        if no_link.errno == errno.EINVAL:
            raise error from None
        raise


def _close(descriptors: set[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
