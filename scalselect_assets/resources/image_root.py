"""Resolution of an image reference in a row to a file below the image root, or to a reason for refusal.

No image outside the root is ever opened, whatever a reference says: references are untrusted. They are read
lexically (``a/../b.png`` is ``b.png``, as in a URL), and on a local file system a symbolic link must also
lead to a place below the root, which `resources.beneath` sees to. An image is known everywhere else by its
normalised path; an image inside a shard by its address, ``<shard>#<row>/<n>``, whose shard lies below the
pool's folder or else below the root. A name that exists in another Unicode normal form (macOS writes NFD) is
found.
"""

import errno
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from upath import UPath

from scalselect_assets.method.representation.rejection import Rejection, RejectionReason
from scalselect_assets.resources.beneath import Beneath, NoRegularFileError, OutsideError
from scalselect_assets.resources.files import FileState, is_local, store_state
from scalselect_assets.resources.forms.embedded import Address, address_of
from scalselect_assets.resources.forms.form import Form, ShardFile
from scalselect_assets.resources.forms.registry import form_of
from scalselect_assets.resources.pool_files import shard_file_state
from scalselect_assets.resources.shard_reader import ShardFormatError
from scalselect_assets.resources.shown_text import masked
from scalselect_assets.resources.written_json import shorten

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EILSEQ)
_NOT_A_FILE = "is not a regular file; refer to an image file"


@dataclass(frozen=True, slots=True)
class ResolvedImage:
    """The result of resolving one image reference."""

    path: str | None
    """Normalised path from the root, with ``/``; None if it can never be a file below the root."""
    rejection: Rejection | None
    """The reason why the image cannot be opened now; None if it can."""


class ImageRoot:
    """The folder that images may come from, seen from one place that refers to them.

    Results are kept, as many rows share an image. So an instance serves one pass over one shard, and the next
    pass, which may find other files, makes a new one. Memory: the distinct references.
    """

    def __init__(self, root: UPath, base: UPath, shards: UPath | None = None, *, moved: bool = False) -> None:
        """Set up the root.

        Args:
            root: Folder that holds every image that may be opened.
            base: Folder that relative references start from: the shard's, or the root itself.
            shards: The pool's folder, from which the addresses of embedded images start; None means the root.
            moved: Whether an absolute path outside the root, for example from another machine, is matched to
                the file below the root that the longest possible end of the path names.

        Raises:
            ValueError: ``base`` is not at or below ``root``.
        """
        self.root = root
        self._shards, self._moved = shards, moved
        self._moved_from: dict[str, str] = {}
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

        None if it can never be a file below the root. The file system is asked only about links in an
        absolute path.
        """
        try:
            return self._path(reference)
        except _RefusedError:
            return None

    def state(self, path: str) -> FileState | Rejection:
        """Size and version of the image at a normalised path, or why it cannot be opened.

        Raises:
            OSError: The file system cannot say, as in ``resolve``.
        """
        try:
            return self._state(path)
        except _RefusedError as refused:
            return self._rejection(path, refused)

    def read(self, path: str) -> bytes:
        """The bytes of the image at a normalised path.

        Raises:
            FileNotFoundError: There is no such file, or it is inside a shard that is damaged.
            PermissionError: The path leaves the root.
            OSError: The file cannot be read.
        """
        if embedded := _embedded(path):
            form, address = embedded
            with self._refusals_as_errors(path):
                file, state = self._shard(address)
            try:
                return form.read_image(file, state.version, address)
            except ShardFormatError as error:
                # The damaged shard is reported elsewhere; here its images count as missing.
                raise FileNotFoundError(f"image {path} cannot be read: {error}") from error
        if self._local:
            with self.open(path) as image:
                return image.read()
        with self._refusals_as_errors(path):
            there = self._name_there(path)
        data: bytes = self.root.fs.cat_file(posixpath.join(self.root.path, there))
        return data

    def open(self, path: str) -> BinaryIO:
        """Open the image at a normalised path of a local root; raises as ``read``.

        Reading or linking the open file is safe: it is the very file that was checked.
        """
        with self._refusals_as_errors(path):
            normal = self._name_there(path)
            with _refusals(normal):
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
            path = self._name_there(path)
        except _RefusedError as refused:
            return ResolvedImage(path, self._rejection(reference, refused))
        return ResolvedImage(path, None)

    def _path(self, reference: str) -> str:
        """The normalised path that a reference means."""
        if _embedded(reference):
            return reference
        target = self._target(reference)
        if "\0" in target:
            raise _RefusedError(RejectionReason.MISSING_IMAGE, "holds a NUL character; correct the path")
        path = _below(self._lexical_root, _normal(posixpath.join(self._base, target)))
        if path is None and self._local and target.startswith("/"):
            # An absolute path may name the root by another way than the deployment does.
            path = _below(self._real_root, os.path.realpath(target))
        if path is None and self._moved and target.startswith("/"):
            path = self._end_below(_normal(target))
        if path is None:
            raise _RefusedError(RejectionReason.OUTSIDE_IMAGE_ROOT, "lies")
        return path

    def _end_below(self, path: str) -> str | None:
        """The longest end of an absolute path that names something below the root.

        The answer is kept for each folder, as images of one folder stay together.
        """
        folder, _, name = path.rpartition("/")
        if folder in self._moved_from:
            return posixpath.join(self._moved_from[folder], name)
        parts = folder.split("/")[1:]
        for start in range(len(parts) + 1):
            below = "/".join(parts[start:])
            if self._is_there(posixpath.join(below, name)):
                self._moved_from[folder] = below
                return posixpath.join(below, name)
        return None

    def _target(self, reference: str) -> str:
        """The path in a reference, relative to the base or absolute."""
        if reference[:5].lower() == "data:":
            what = "is a data URI that is not Base64; write it again, or to a file and refer to that"
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
        """The state of the image at a normalised path, or of the shard that it is in.

        Raises:
            _RefusedError: The path is not a file, or is outside the root.
            OSError: The file system cannot say.
        """
        if embedded := _embedded(path):
            return self._shard(embedded[1])[1]
        try:
            return self._state_as_written(path)
        except _RefusedError as refused:
            other = None if path.isascii() else self._other_form(path)
            if other is None or refused.reason is not RejectionReason.MISSING_IMAGE:
                raise
            return self._state_as_written(other)

    def _state_as_written(self, path: str) -> FileState:
        normal = posixpath.normpath(path)
        with _refusals(normal):
            if self._local:
                status = self._files.status(normal)
                return FileState(status.st_size, str(status.st_mtime_ns))
            info = self.root.fs.info(posixpath.join(self.root.path, normal))
            if info["type"] != "file":
                raise NoRegularFileError(normal)
            return store_state(info)

    def _shard(self, address: Address) -> tuple[ShardFile, FileState]:
        """The shard that holds an embedded image, below the pool's folder or else below the root.

        A training file's addresses lead to the pool that it was chosen from, which is then the root.
        """
        name = posixpath.normpath(address.shard)
        if name.startswith("/") or name.split("/", maxsplit=1)[0] == "..":
            raise _RefusedError(RejectionReason.OUTSIDE_IMAGE_ROOT, "lies")
        for folder in (self._shards, self.root):
            if folder is None:
                continue
            try:
                return ShardFile(folder, name), shard_file_state(folder, name)
            except OSError as error:
                if not (isinstance(error, FileNotFoundError) or error.errno in _NO_SUCH_FILE):
                    raise
        what = "is in a shard that does not exist; add the file or correct the address"
        raise _RefusedError(RejectionReason.MISSING_IMAGE, what)

    def _name_there(self, path: str) -> str:
        """A normalised path as the file system spells it.

        Raises:
            _RefusedError: There is no such file, or it is outside the root.
            OSError: The file system cannot say.
        """
        self._state(path)
        if path.isascii() or _embedded(path) or self._is_there(path):
            return path if _embedded(path) else posixpath.normpath(path)
        return self._other_form(path) or path

    def _other_form(self, path: str) -> str | None:
        """The path in the Unicode normal forms that its parts have on disk; None where there is none."""
        found: list[str] = []
        for part in path.split("/"):
            forms = (unicodedata.normalize(form, part) for form in ("NFC", "NFD"))
            there = (
                name for name in dict.fromkeys([part, *forms]) if self._is_there("/".join([*found, name]))
            )
            if (name := next(there, None)) is None:
                return None
            found.append(name)
        spelt = "/".join(found)
        return None if spelt == path else spelt

    def _is_there(self, path: str) -> bool:
        if self._local:
            return os.path.lexists(posixpath.join(self._lexical_root, path))
        return bool(self.root.fs.exists(posixpath.join(self.root.path, path)))

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
    """Turn errors that concern a path, and not the file system, into a refusal."""
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


def _embedded(reference: str) -> tuple[Form, Address] | None:
    """The form and the address of a reference into a shard; None for a path."""
    address = address_of(reference) if "#" in reference else None
    form = address and form_of(address.shard)
    return (form, address) if form and address else None


class _RefusedError(Exception):
    """An image that cannot be opened, with the reason and a description to print after its name."""

    def __init__(self, reason: RejectionReason, what: str) -> None:
        super().__init__(what)
        self.reason = reason
        self.what = what


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
