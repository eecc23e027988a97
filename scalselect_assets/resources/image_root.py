"""From an image reference in a row to a file below the image root, or to the reason why there is none.

No image outside the root is ever opened, whatever a reference says: references are untrusted. They are read
lexically (``a/../b.png`` is ``b.png``, as in a URL), and on a local file system a symbolic link must also
lead to a place below the root, which `resources.beneath` sees to. An image is known everywhere else by its
normalised path.
"""

import errno
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from upath import UPath

from scalselect_assets.method.representation.rejection import Rejection, RejectionReason
from scalselect_assets.resources.beneath import Beneath, NoRegularFileError, OutsideError
from scalselect_assets.resources.samples import shorten
from scalselect_assets.resources.shown_text import masked

_LOCAL_PROTOCOLS = ("", "file", "local")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EILSEQ)
_NOT_A_FILE = "is not a regular file; refer to an image file"
_STORE_VERSION_FIELDS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated", "created")


@dataclass(frozen=True, slots=True)
class FileState:
    """What can be told of a file without reading it."""

    size: int
    version: str
    """Modification time in nanoseconds, or an object store's ETag (failing that, its date)."""


@dataclass(frozen=True, slots=True)
class ResolvedImage:
    """Where a reference leads."""

    path: str | None
    """Normalised, relative to the root, with ``/``; None for what can never be a file below the root."""
    rejection: Rejection | None
    """Why it cannot be opened now; None when it can."""


class ImageRoot:
    """The folder that images may come from, seen from one place that refers to them.

    What a reference resolves to is remembered, as many rows share an image: an instance serves one pass over
    one shard, and the next pass, which may find other files, makes its own. Memory: the distinct references.
    """

    def __init__(self, root: UPath, base: UPath) -> None:
        """Set up the root.

        Args:
            root: Folder that holds every image that may be opened.
            base: Folder that relative references start from: the shard's, or the root itself.

        Raises:
            ValueError: ``base`` is not at or below ``root``.
        """
        self.root = root
        self._local = is_local(root)
        self._lexical_root = _absolute(root)
        self._base = self._lexical_root if base is root else _absolute(base)
        if _below(self._lexical_root, self._base) is None:
            msg = (
                f"References start at {base}, which is not below the image root {root}. Give a root above it."
            )
            raise ValueError(msg)
        self._real_root = os.path.realpath(self._lexical_root) if self._local else ""
        self._files = Beneath(self._lexical_root)
        self._resolved: dict[str, ResolvedImage] = {}

    def resolve(self, reference: str) -> ResolvedImage:
        """The file that ``reference`` names, which may be relative, absolute or a URL of the root's kind.

        Raises:
            OSError: The file system cannot say (I/O error, no permission to search a folder).
        """
        if reference not in self._resolved:
            self._resolved[reference] = self._resolve(reference)
        return self._resolved[reference]

    def path_of(self, reference: str) -> str | None:
        """The normalised path that ``reference`` means, whether or not there is such a file.

        None for what can never be a file below the root. Asks the file system about nothing but the links in
        an absolute path.
        """
        try:
            return self._path(reference)
        except _RefusedError:
            return None

    def state(self, path: str) -> FileState | Rejection:
        """Size and version of the image at a normalised path, or why it cannot be opened.

        Raises:
            OSError: As in ``resolve``.
        """
        try:
            return self._state(path)
        except _RefusedError as refused:
            return self._rejection(path, refused)

    def read(self, path: str) -> bytes:
        """The bytes of the image at a normalised path.

        Raises:
            FileNotFoundError: There is no such file.
            PermissionError: The path leaves the root.
            OSError: The file cannot be read.
        """
        if self._local:
            with self.open(path) as file:
                return file.read()
        with self._refusals_as_errors(path):
            self._state(path)
        data: bytes = self.root.fs.cat_file(posixpath.join(self.root.path, posixpath.normpath(path)))
        return data

    def open(self, path: str) -> BinaryIO:
        """Open the image at a normalised path of a local root; raises as ``read``.

        What is then read from the open file, or linked to, is the file that was checked.
        """
        normal = posixpath.normpath(path)
        with self._refusals_as_errors(path), _refusals(normal):
            return self._files.open(normal)

    @contextmanager
    def _refusals_as_errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except _RefusedError as refused:
            outside = refused.reason is RejectionReason.OUTSIDE_IMAGE_ROOT
            error = PermissionError if outside else FileNotFoundError
            raise error(self._rejection(path, refused).detail) from refused

    def _resolve(self, reference: str) -> ResolvedImage:
        path = None
        try:
            path = self._path(reference)
            self._state(path)
        except _RefusedError as refused:
            return ResolvedImage(path, self._rejection(reference, refused))
        return ResolvedImage(path, None)

    def _path(self, reference: str) -> str:
        """The normalised path that a reference means."""
        target = self._target(reference)
        if "\0" in target:
            raise _RefusedError(RejectionReason.MISSING_IMAGE, "holds a NUL character; correct the path")
        path = _below(self._lexical_root, _normal(posixpath.join(self._base, target)))
        if path is None and self._local and target.startswith("/"):
            # An absolute path may name the root by another way than the deployment does.
            path = _below(self._real_root, os.path.realpath(target))
        if path is None:
            raise _RefusedError(RejectionReason.OUTSIDE_IMAGE_ROOT, "lies")
        return path

    def _target(self, reference: str) -> str:
        """The path in a reference, relative to the base or absolute."""
        if reference[:5].lower() == "data:":
            what = "is data inside the row, which is not read; write it to a file and refer to that"
            raise _RefusedError(RejectionReason.MISSING_IMAGE, what)
        scheme = _SCHEME.match(reference)
        if not scheme:
            return reference
        name, rest = scheme[1].lower(), reference[scheme.end() :]
        if name == "file" and self._local:
            path = unquote(rest.removeprefix("localhost"))
            if path.startswith("/"):
                return path
        elif not self._local and name in _names(self.root.fs.protocol):
            return posixpath.join("/", rest)
        what = "is remote, and remote images are not fetched; download it and refer to the file"
        raise _RefusedError(RejectionReason.MISSING_IMAGE, what)

    def _state(self, path: str) -> FileState:
        """The state of the image at a normalised path.

        Raises:
            _RefusedError: It is not a file, or outside the root.
            OSError: The file system cannot say.
        """
        normal = posixpath.normpath(path)
        with _refusals(normal):
            if self._local:
                status = self._files.status(normal)
                return FileState(status.st_size, str(status.st_mtime_ns))
            info = self.root.fs.info(posixpath.join(self.root.path, normal))
            if info["type"] != "file":
                raise NoRegularFileError(normal)
            return _store_state(info)

    def _rejection(self, reference: str, refused: "_RefusedError") -> Rejection:
        image = f"image {masked(shorten(reference))} {refused.what}"
        if refused.reason is RejectionReason.OUTSIDE_IMAGE_ROOT:
            detail = (
                f"{image} outside the image root {self.root}, and nothing outside it is opened; move the "
                "image below the root or declare a root that holds it"
            )
        else:
            detail = f"{image} (image root {self.root})"
        return Rejection(refused.reason, detail)


@contextmanager
def _refusals(path: str) -> Iterator[None]:
    """Turn what is the matter with a path, and not with the file system, into a refusal."""
    if path.startswith("/") or path.split("/", maxsplit=1)[0] == "..":
        raise _RefusedError(RejectionReason.OUTSIDE_IMAGE_ROOT, "lies")
    try:
        yield
    except OutsideError as error:
        raise _RefusedError(RejectionReason.OUTSIDE_IMAGE_ROOT, "follows a link that leads") from error
    except NoRegularFileError as error:
        raise _RefusedError(RejectionReason.MISSING_IMAGE, _NOT_A_FILE) from error
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno in _NO_SUCH_FILE:
            what = "does not exist; add the file or correct the path"
            raise _RefusedError(RejectionReason.MISSING_IMAGE, what) from error
        raise


def is_local(path: UPath) -> bool:
    """Whether a path is on this machine's file system, so that the system can be asked about links."""
    return path.protocol in _LOCAL_PROTOCOLS


def file_state(path: UPath) -> FileState:
    """Size and version of any file, local or in an object store.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be asked about.
    """
    if not is_local(path):
        return _store_state(path.fs.info(path.path))
    status = os.stat(path.path)  # noqa: PTH116 - without the cost of another path object
    return FileState(status.st_size, str(status.st_mtime_ns))


class _RefusedError(Exception):
    """An image that cannot be opened: the reason, and what is the matter with it, to follow its name."""

    def __init__(self, reason: RejectionReason, what: str) -> None:
        super().__init__(what)
        self.reason = reason
        self.what = what


def _store_state(info: Mapping[str, Any]) -> FileState:
    version = next((info[field] for field in _STORE_VERSION_FIELDS if info.get(field)), "")
    return FileState(int(info["size"]), str(version))


def _absolute(folder: UPath) -> str:
    """The normalised absolute path of a folder; in an object store the bucket's name stands first in it."""
    if is_local(folder):
        path = folder.path
        return _normal(path if path.startswith("/") else Path(path).absolute().as_posix())
    return _normal(posixpath.join("/", folder.path))


def _normal(path: str) -> str:
    """An absolute path without ``..``, double or closing slashes (POSIX would keep two leading ones)."""
    return "/" + posixpath.normpath(path).lstrip("/")


def _below(folder: str, path: str) -> str | None:
    """``path`` relative to ``folder`` when it is at or below it; both absolute and normalised."""
    if path == folder:
        return "."
    prefix = posixpath.join(folder, "")
    return path.removeprefix(prefix) if path.startswith(prefix) else None


def _names(protocol: str | tuple[str, ...]) -> tuple[str, ...]:
    return (protocol,) if isinstance(protocol, str) else protocol
