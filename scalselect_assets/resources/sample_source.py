"""The sample pool: its shards, the content of each, and whether that content has changed.

A shard is one file of the pool, of any form that `forms` reads. Its key is its path below the
source, escaped where Dagster's partition keys do not allow a character. Reading streams; discovery keeps a
small ``ShardIndex`` of each shard, so that the next discovery reads no bytes of a file that has not changed
and asks only for the images' sizes and times.
"""

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import unquote

from upath import UPath

from scalselect_assets.method.representation.rejection import Rejection, RejectionReason
from scalselect_assets.resources.files import FileState, is_local
from scalselect_assets.resources.forms.embedded import address_of, to_data_uri
from scalselect_assets.resources.forms.form import Form, ShardFile
from scalselect_assets.resources.forms.registry import form_of
from scalselect_assets.resources.forms.text import PLAIN, TextForm
from scalselect_assets.resources.image_root import ImageRoot
from scalselect_assets.resources.judged_rows import PoolRow, judge
from scalselect_assets.resources.pool_files import shard_file_state
from scalselect_assets.resources.pool_listing import (
    DEFAULT_IGNORE,
    PoolListing,
    folder_identity,
    list_shards,
)
from scalselect_assets.resources.samples import (
    occurrence_key,
    parse_row,
    with_image_paths,
)
from scalselect_assets.resources.shard_reader import Container, ShardFormatError
from scalselect_assets.resources.written_json import shorten

# Dagster refuses "..." and these control characters in a partition key; an undecodable byte of a file name
# (a surrogate in Python) could not be stored as text.
_NOT_IN_KEYS = re.compile(r"[%\a\b\f\n\r\t\v\0\udc80-\udcff]|\.(?=\.\.)")


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The facts about a shard file that discovery keeps."""

    size: int
    version: str
    """Modification time in nanoseconds or ETag, when the bytes were read."""
    sha256: str
    n_rows: int | None
    """Number of rows; None if the file is not readable as rows."""
    images: tuple[str, ...]
    """The distinct images that the shard names, relative to the image root, sorted; missing ones included."""
    source: str
    """The sample source and the image root that ``images`` belong to."""
    image_root: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "images": list(self.images)}

    @classmethod
    def from_json(cls, value: Any) -> "ShardIndex":
        """Inverse of ``to_json``.

        Raises:
            ValueError: ``value`` is no index, or one of another layout.
        """
        try:
            return cls(**{**value, "images": tuple(value["images"])})
        except (KeyError, TypeError) as error:
            msg = f"Got no shard index but {shorten(repr(value))}. Delete it; discovery writes it again."
            raise ValueError(msg) from error


@dataclass(frozen=True, slots=True)
class ShardState:
    """A shard as it is now."""

    fingerprint: str
    """Hash of the shard's bytes, and of size and time of every image that it names."""
    changed_at: float | None
    """Latest modification of the file or an image, in seconds since the epoch; None in an object store,
    where files appear whole."""
    missing_images: tuple[str, ...] = ()
    """The images that the shard names but that do not exist."""


@dataclass(frozen=True, slots=True)
class SampleSource:
    """A pool of samples in files, local or in an object store.

    Without an image root, image references start from the folder of the shard that holds them and may lead
    anywhere below the source folder; with one, they start from it and may lead anywhere below it.
    """

    source: UPath
    """A folder, in which every file of a known form is a shard, or one such file."""
    image_root: UPath | None = None
    exclude: tuple[UPath, ...] = ()
    """Folders below the source that hold no shards, such as the artifacts of the selection itself."""
    ignore: tuple[str, ...] = DEFAULT_IGNORE
    """Patterns of names or paths below the source that are no shards."""

    def shard_keys(self) -> dict[str, UPath]:
        """The shards there are now, sorted by key.

        Raises:
            FileNotFoundError: The source does not exist.
            OSError: A folder cannot be listed; a partial answer would look like deleted shards.
        """
        return self.shards_of(self.listing())

    def shards_of(self, listing: PoolListing) -> dict[str, UPath]:
        """The shards of a listing, sorted by key."""
        folder = self._folder()
        return dict(sorted((self.shard_key(path), folder / path) for path in listing.shards))

    def listing(self) -> PoolListing:
        """The shards there are now, and the files and folders passed over.

        Hidden files and folders, ignored ones and stores of selections are skipped, and links to folders are
        not followed.

        Raises:
            FileNotFoundError: The source does not exist.
            OSError: A folder cannot be listed; a partial answer would look like deleted shards.
        """
        if not is_local(self.source):
            # A daemon lives long, and object stores' listings are cached for the life of a process.
            self.source.fs.invalidate_cache()
        folder = self._folder()
        if folder is not self.source:
            return PoolListing([self.source.name])
        excluded = frozenset(folder_identity(path) for path in self.exclude)
        return list_shards(folder, excluded, self.ignore)

    @staticmethod
    def shard_key(relative_path: str) -> str:
        """The partition key of the shard at a path relative to the source folder."""

        def escape(match: re.Match[str]) -> str:
            return "".join(f"%{byte:02X}" for byte in match[0].encode(errors="surrogateescape"))

        return _NOT_IN_KEYS.sub(escape, relative_path)

    def shard_path(self, key: str) -> UPath:
        """The file of a shard key, whether or not it exists.

        Raises:
            ValueError: ``key`` is not a key that ``shard_key`` gives, or it leads out of the source.
            FileNotFoundError: The source does not exist.
        """
        return self._folder() / self._relative_path(key)

    def read_shard(self, key: str) -> Iterator[PoolRow]:
        """Every row of a shard, in order, each accepted or rejected.

        Memory: the keys of the rows and the distinct image references.

        Raises:
            FileNotFoundError: The shard or the image root does not exist.
            ShardFormatError: The file is not readable as rows; see `shard_reader`.
            OSError: The shard cannot be read, or the file system cannot say whether an image exists.
        """
        file = self.shard_file(key)
        images = self._images(key)
        n_seen: dict[str, int] = {}
        accepted: dict[str, str] = {}
        for row in _form(file).rows(file):
            judged, repeat = judge(row, images)
            base = judged.sample_key
            if repeat is not None and repeat in accepted:
                detail = f"the row repeats {accepted[repeat]} of this shard, all but its id; remove one"
                rejection = Rejection(RejectionReason.DUPLICATE, detail)
                judged = replace(judged, sample=None, image_paths=(), rejection=rejection)
            elif repeat is not None:
                named = "" if judged.source_id is None else f" (id {shorten(judged.source_id)})"
                accepted[repeat] = f"row {row.row}{named}"
            occurrence = n_seen.get(base, 0)
            n_seen[base] = occurrence + 1
            yield replace(judged, sample_key=occurrence_key(base, occurrence)) if occurrence else judged

    def container(self, key: str) -> Container:
        """Whether the shard is a JSON array or JSON Lines.

        Raises:
            ShardFormatError: The shard begins like neither.
            OSError: The file cannot be read.
        """
        file = self.shard_file(key)
        return _form(file).container(file)

    def shard_file(self, key: str) -> ShardFile:
        """A shard's file. Opening it never follows a link out of the pool.

        Raises:
            ValueError: ``key`` is not a key that ``shard_key`` gives.
            FileNotFoundError: The source does not exist.
        """
        return ShardFile(*self._place(key))

    def export_text(self, key: str, text: str, image_paths: Sequence[str]) -> str:
        """A row's text for a file of rows from all over the pool, read with the image root beside it.

        The text is verbatim, with two exceptions. In a pool without a declared image root, references of a
        shard in a subfolder start there and are rewritten to start from the source folder. Images that a text
        shard holds as Base64 are put back into the row; those of tables and archives keep their address.

        Args:
            key: The row's shard.
            text: The row's text, as it was read.
            image_paths: Its images, relative to the image root; empty for a row without any.

        Raises:
            FileNotFoundError: The row has an embedded image, and the shard or the image is gone.
            OSError: The shard cannot be read.
        """
        starts_at_root = self.image_root is not None or "/" not in key
        if not image_paths or (starts_at_root and not any("#" in path for path in image_paths)):
            return text
        file = self.shard_file(key)
        is_text = isinstance(_form(file), TextForm)
        held = {path for path in image_paths if is_text and _is_within(path, file.name)}
        if starts_at_root and not held:
            return text
        return with_image_paths(
            text,
            [to_data_uri(self.open_image(path)) if path in held else path for path in image_paths],
        )

    def index_shard(self, key: str) -> ShardIndex:
        """Read a shard once and build the index that discovery keeps of it.

        A file that is not readable as rows is indexed by its bytes. So it alone fails, and only until the
        file is replaced.

        Raises:
            FileNotFoundError: The shard or the image root does not exist.
            OSError: The shard cannot be read.
        """
        file = self.shard_file(key)
        images = self._images(key)
        # The state is read before the bytes: a write in between then shows as a change next time.
        state = self._file_state(key)
        digest = hashlib.sha256()
        named: set[str] = set()
        n_rows: int | None = 0
        try:
            file.open().close()
        except ShardFormatError as error:
            unread = hashlib.sha256(str(error).encode(errors="surrogateescape")).hexdigest()
            return self._index(state, unread, None, named)
        try:
            for n_rows, row in enumerate(_form(file).rows(file, digest), start=1):  # noqa: B007
                sample = None if row.error else parse_row(row.text).sample
                for reference in sample.images if sample else ():
                    image = images.path_of(reference)
                    if image is not None and not _is_within(image, file.name):
                        named.add(image)
        except ShardFormatError:
            n_rows = None
            named.clear()
        return self._index(state, digest.hexdigest(), n_rows, named)

    def _index(self, state: FileState, sha256: str, n_rows: int | None, images: set[str]) -> ShardIndex:
        return ShardIndex(
            state.size,
            state.version,
            sha256,
            n_rows,
            tuple(sorted(images)),
            str(self.source),
            self._declared_root(),
        )

    def is_current(self, key: str, index: ShardIndex) -> bool:
        """Whether the index still holds: the file's size and time are the same, and so are the image folders.

        Raises:
            FileNotFoundError: The shard does not exist.
        """
        state = self._file_state(key)
        now = (state.size, state.version, str(self.source), self._declared_root())
        return now == (index.size, index.version, index.source, index.image_root)

    def changed_at(self, key: str) -> float | None:
        """The time when the shard file was last modified, as in `ShardState`; its images are not looked at.

        Raises:
            FileNotFoundError: The shard does not exist.
        """
        return int(self._file_state(key).version) / 1e9 if is_local(self.source) else None

    def shard_state(self, key: str, index: ShardIndex) -> ShardState:
        """The shard's bytes, by its index, and its images as these are now.

        An image that appears, changes, disappears or moves out of the image root changes the fingerprint,
        and nothing else does.

        Raises:
            FileNotFoundError: The image root does not exist.
            OSError: The file system cannot say whether an image exists.
        """
        self._relative_path(key)
        root = self._present_images_folder()
        images = ImageRoot(root, root, self.shards_folder())
        seen: list[tuple[object, ...]] = []
        changed = [index.version]
        for path in index.images:
            state = images.state(path)
            if isinstance(state, Rejection):
                seen.append((path, state.reason))
            else:
                seen.append((path, state.size, state.version))
                changed.append(state.version)
        fingerprint = hashlib.sha256(json.dumps([index.sha256, seen]).encode()).hexdigest()
        local = is_local(self.source) and is_local(root)
        changed_at = max(map(int, changed)) / 1e9 if local else None
        missing = (path for path, *rest in seen if rest == [RejectionReason.MISSING_IMAGE])
        return ShardState(fingerprint, changed_at, tuple(map(str, missing)))

    def shard_fingerprint(self, key: str, index: ShardIndex) -> str:
        """The fingerprint of ``shard_state``; raises as ``shard_state``."""
        return self.shard_state(key, index).fingerprint

    def open_image(self, relative_path: str) -> bytes:
        """The bytes of an image, by its path relative to the image root or its address in a shard.

        Raises:
            FileNotFoundError: There is no such image, or the shard that holds it is damaged.
            PermissionError: The path leads out of the image root.
            OSError: The file cannot be read.
        """
        return self.image_files().read(relative_path)

    def image_files(self) -> ImageRoot:
        """The images of the pool, by their paths relative to the image root or their addresses.

        Raises:
            FileNotFoundError: The source does not exist.
        """
        root = self.images_folder()
        return ImageRoot(root, root, self.shards_folder())

    def images_folder(self) -> UPath:
        """The folder that image paths are relative to: the image root, or the source folder if none is set.

        Raises:
            FileNotFoundError: The source does not exist.
        """
        return self.image_root or self._folder()

    def shards_folder(self) -> UPath:
        """The folder that the addresses of embedded images start from.

        Raises:
            FileNotFoundError: The source does not exist.
        """
        folder = self._folder()
        return folder if folder is self.source else self._own_place(folder)[0]

    def _declared_root(self) -> str | None:
        return None if self.image_root is None else str(self.image_root)

    def _relative_path(self, key: str) -> str:
        """The path of the shard below the source's folder."""
        relative = unquote(key, errors="surrogateescape")
        normal = posixpath.normpath(relative)
        leads_out = normal.startswith("/") or normal.split("/")[0] in (".", "..")
        if leads_out or relative != normal or key != self.shard_key(relative):
            msg = f"Got the shard key {key!r}; a key is a path below {self.source}. Take one from discovery."
            raise ValueError(msg)
        return relative

    def _file_state(self, key: str) -> FileState:
        """The state of a shard file; every discovery reads it for every shard."""
        return shard_file_state(*self._place(key))

    def _place(self, key: str) -> tuple[UPath, str]:
        """The folder that a shard's file must lie below, and its path there."""
        folder, relative = self._folder(), self._relative_path(key)
        return (folder, relative) if folder is self.source else self._own_place(folder)

    def _own_place(self, folder: UPath) -> tuple[UPath, str]:
        """The place of a single declared file. It may be a link, because the user declared it."""
        if not is_local(folder):
            return folder, self.source.name
        real = UPath(os.path.realpath(self.source.path))
        return real.parent, real.name

    def _folder(self) -> UPath:
        """The folder that shard keys are relative to."""
        if _is_folder(self.source):
            return self.source
        if self.source.is_file():
            return self.source.parent
        msg = (
            f"The sample source {self.source} does not exist. Correct the selection's source, or mount the "
            "file system that holds it."
        )
        raise FileNotFoundError(msg)

    def _images(self, key: str) -> ImageRoot:
        root = self._present_images_folder()
        if self.image_root is None:
            return ImageRoot(root, self.shard_path(key).parent, self.shards_folder())
        return ImageRoot(root, root, self.shards_folder(), moved=True)

    def _present_images_folder(self) -> UPath:
        """``images_folder``, after a check that the folder exists."""
        if self.image_root is None:
            return self._folder()
        if not _is_folder(self.image_root):
            # An error, not a rejection of each row: an unmounted disk says nothing about the data.
            msg = (
                f"The image root {self.image_root} is not a folder. Correct the selection's image root, or "
                "mount the file system that holds it."
            )
            raise FileNotFoundError(msg)
        return self.image_root


def _form(file: ShardFile) -> Form:
    """The form of a shard. A single declared file may have any name; an unknown suffix means text."""
    return form_of(file.name) or PLAIN


def _is_within(path: str, shard: str) -> bool:
    """Whether an image lies inside the shard that names it."""
    address = address_of(path)
    return address is not None and address.shard == shard


def _is_folder(path: UPath) -> bool:
    return os.path.isdir(path.path) if is_local(path) else bool(path.is_dir())  # noqa: PTH112 - ten times faster
