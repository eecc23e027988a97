"""The sample pool: which shards there are, what each holds, and whether it is still the same.

A shard is one file of the pool. Its key is its path below the source, escaped where Dagster's partition keys
do not allow a character. Reading streams; discovery keeps a small ``ShardIndex`` of each shard, so that the
next discovery reads no bytes of a file that has not changed and asks only for the images' sizes and times.
"""

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO
from urllib.parse import unquote

from upath import UPath

from scalselect_assets.method.representation.rejection import Rejection, RejectionReason
from scalselect_assets.resources.image_root import FileState, ImageRoot, is_local
from scalselect_assets.resources.pool_files import open_shard_file, shard_file_state
from scalselect_assets.resources.samples import (
    Sample,
    content_key,
    occurrence_key,
    parse_row,
    shorten,
    text_key,
    with_image_paths,
)
from scalselect_assets.resources.shard_reader import (
    LINES_SUFFIXES,
    Container,
    RowText,
    ShardFormatError,
    container,
    read_chunks,
    rows_of,
)

SHARD_SUFFIXES = (".json", *LINES_SUFFIXES)
STORE_MARK = "selection.yaml"
"""A folder with a file of this name is the store of some selection, and holds no shards."""

# Dagster refuses "..." and these control characters in a partition key; an undecodable byte of a file name
# (a surrogate in Python) could not be stored as text.
_NOT_IN_KEYS = re.compile(r"[%\a\b\f\n\r\t\v\0\udc80-\udcff]|\.(?=\.\.)")


@dataclass(frozen=True, slots=True)
class PoolRow:
    """One row of a shard: a sample whose images are all there, or a rejection."""

    row: int
    """Place in the shard, from 0."""
    line: int
    """Line of the file on which it starts, from 1."""
    text: str
    """The row's JSON text verbatim."""
    sample_key: str
    """Hash of its content, unique within the shard."""
    source_id: str | None
    """The row's ``id`` as a string, where it has one."""
    sample: Sample | None
    """None exactly where ``rejection`` is given."""
    image_paths: tuple[str, ...]
    """The images, for ``SampleSource.open_image``; empty where the row is rejected."""
    rejection: Rejection | None


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """What discovery remembers of a shard file."""

    size: int
    version: str
    """Modification time in nanoseconds or ETag, when the bytes were read."""
    sha256: str
    n_rows: int | None
    """None where the file is not readable as rows."""
    images: tuple[str, ...]
    """The distinct images that it names, relative to the image root, sorted; missing ones included."""
    source: str
    """The sample source and the image root that ``images`` were told against."""
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
    """Hash of its bytes and of size and time of every image it names."""
    changed_at: float | None
    """Latest modification of the file or an image, in seconds since the epoch; None in an object store,
    where files appear whole."""
    missing_images: tuple[str, ...] = ()
    """The images that it names and that are not there."""


@dataclass(frozen=True, slots=True)
class SampleSource:
    """A pool of samples in files, local or in an object store.

    Without an image root, image references start from the folder of the shard that holds them and may lead
    anywhere below the source folder; with one, they start from it and may lead anywhere below it.
    """

    source: UPath
    """A folder, all of whose JSON and JSON Lines files are shards, or one such file."""
    image_root: UPath | None = None
    exclude: tuple[UPath, ...] = ()
    """Folders below the source that hold no shards, such as the artifacts of the selection itself."""

    def shard_keys(self) -> dict[str, UPath]:
        """The shards there are now, sorted by key.

        Hidden files and folders and stores of selections are skipped, and links to folders are not followed.

        Raises:
            FileNotFoundError: The source does not exist.
            OSError: A folder cannot be listed; a partial answer would look like deleted shards.
        """
        if not is_local(self.source):
            # A daemon lives long, and object stores' listings are cached for the life of a process.
            self.source.fs.invalidate_cache()
        folder = self._folder()
        if folder is self.source:
            excluded = frozenset(_identity(path) for path in self.exclude)
            paths = {relative: folder / relative for relative in _walk(folder, "", excluded)}
        else:
            paths = {self.source.name: self.source}
        return dict(sorted((self.shard_key(relative), path) for relative, path in paths.items()))

    @staticmethod
    def shard_key(relative_path: str) -> str:
        """The partition key of the shard at a path relative to the source folder."""

        def escape(match: re.Match[str]) -> str:
            return "".join(f"%{byte:02X}" for byte in match[0].encode(errors="surrogateescape"))

        return _NOT_IN_KEYS.sub(escape, relative_path)

    def shard_path(self, key: str) -> UPath:
        """The file of a shard key, whether or not it exists.

        Raises:
            ValueError: It is not a key that ``shard_key`` gives, or it leads out of the source.
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
        path = self.shard_path(key)
        images = self._images(path)
        n_seen: dict[str, int] = {}
        accepted: dict[str, str] = {}
        with self.open_shard(key) as stream:
            for row in rows_of(read_chunks(stream), path):
                judged = _judge(row, images)
                base = judged.sample_key
                if judged.sample and base in accepted:
                    detail = f"the row repeats {accepted[base]} of this shard, text and images; remove one"
                    rejection = Rejection(RejectionReason.DUPLICATE, detail)
                    judged = replace(judged, sample=None, image_paths=(), rejection=rejection)
                elif judged.sample:
                    named = "" if judged.source_id is None else f" (id {shorten(judged.source_id)})"
                    accepted[base] = f"row {row.row}{named}"
                occurrence = n_seen.get(base, 0)
                n_seen[base] = occurrence + 1
                yield replace(judged, sample_key=occurrence_key(base, occurrence)) if occurrence else judged

    def container(self, key: str) -> Container:
        """Whether the shard is a JSON array or JSON Lines.

        Raises:
            ShardFormatError: It begins like neither.
            OSError: It cannot be read.
        """
        with self.open_shard(key) as stream:
            return container(read_chunks(stream), self.shard_path(key))

    def open_shard(self, key: str) -> BinaryIO:
        """Open a shard's file, which lies in the pool whatever links say.

        Raises:
            ShardFormatError: It is a link that cannot be followed; see `resources.pool_files`.
            FileNotFoundError: The shard does not exist.
            OSError: It cannot be opened.
        """
        return open_shard_file(*self._place(key))

    def export_text(self, key: str, text: str, image_paths: Sequence[str]) -> str:
        """A row's text for a file of rows from all over the pool, read with the image root beside it.

        Verbatim, except that in a pool without a declared image root the references of a shard in a
        subfolder, which start there, are rewritten to start from the source folder.

        Args:
            key: The row's shard.
            text: The row's text, verbatim.
            image_paths: Its images, relative to the image root; empty for a row without any.
        """
        starts_at_root = self.image_root is not None or "/" not in key
        return text if starts_at_root or not image_paths else with_image_paths(text, image_paths)

    def index_shard(self, key: str) -> ShardIndex:
        """Read a shard once for what discovery remembers of it.

        A file that is not readable as rows is indexed by its bytes, so that its failure stays its own and
        ends when the file is replaced.

        Raises:
            FileNotFoundError: The shard or the image root does not exist.
            OSError: The shard cannot be read.
        """
        path = self.shard_path(key)
        images = self._images(path)
        # Asked before the bytes are read: what is written meanwhile shows as a change next time.
        state = self._file_state(key)
        digest = hashlib.sha256()
        named: set[str] = set()
        n_rows: int | None = 0
        try:
            stream = self.open_shard(key)
        except ShardFormatError as error:
            unread = hashlib.sha256(str(error).encode(errors="surrogateescape")).hexdigest()
            return self._index(state, unread, None, named)
        with stream:
            chunks = _digested(read_chunks(stream), digest)
            try:
                for n_rows, row in enumerate(rows_of(chunks, path), start=1):  # noqa: B007
                    sample = None if row.error else parse_row(row.text).sample
                    for reference in sample.images if sample else ():
                        image = images.path_of(reference)
                        if image is not None:
                            named.add(image)
            except ShardFormatError:
                n_rows = None
                named.clear()
                for _ in chunks:
                    pass
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
        """When the shard file was last modified, as in `ShardState`; its images are not looked at.

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
        images = ImageRoot(root, root)
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
        """The fingerprint of ``shard_state``; raises likewise."""
        return self.shard_state(key, index).fingerprint

    def open_image(self, relative_path: str) -> bytes:
        """The bytes of an image, by its path relative to the image root.

        Raises:
            FileNotFoundError: There is no such image.
            PermissionError: The path leads out of the image root.
            OSError: It cannot be read.
        """
        root = self.images_folder()
        return ImageRoot(root, root).read(relative_path)

    def images_folder(self) -> UPath:
        """What image paths are relative to: the image root, else the source folder.

        Raises:
            FileNotFoundError: The source does not exist.
        """
        return self.image_root or self._folder()

    def _declared_root(self) -> str | None:
        return None if self.image_root is None else str(self.image_root)

    def _relative_path(self, key: str) -> str:
        """Where the shard lies below the source's folder."""
        relative = unquote(key, errors="surrogateescape")
        normal = posixpath.normpath(relative)
        leads_out = normal.startswith("/") or normal.split("/")[0] in (".", "..")
        if leads_out or relative != normal or key != self.shard_key(relative):
            msg = f"Got the shard key {key!r}; a key is a path below {self.source}. Take one from discovery."
            raise ValueError(msg)
        return relative

    def _file_state(self, key: str) -> FileState:
        """State of a shard file; asked of every shard in every discovery."""
        return shard_file_state(*self._place(key))

    def _place(self, key: str) -> tuple[UPath, str]:
        """The folder that a shard's file must lie below, and its path there."""
        folder, relative = self._folder(), self._relative_path(key)
        if folder is not self.source and is_local(folder):
            # One file is declared, which may itself be a link: who declares it says where it is.
            real = UPath(os.path.realpath(self.source.path))
            return real.parent, real.name
        return folder, relative

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

    def _images(self, shard: UPath) -> ImageRoot:
        root = self._present_images_folder()
        return ImageRoot(root, root if self.image_root else shard.parent)

    def _present_images_folder(self) -> UPath:
        """``images_folder``, which is there."""
        if self.image_root is None:
            return self._folder()
        if not _is_folder(self.image_root):
            # Not one rejection for each row: a disk that is not mounted says nothing about the data.
            msg = (
                f"The image root {self.image_root} is not a folder. Correct the selection's image root, or "
                "mount the file system that holds it."
            )
            raise FileNotFoundError(msg)
        return self.image_root


def _judge(row: RowText, images: ImageRoot) -> PoolRow:
    """The row as far as it can be told on its own: its key is the base, and duplicates are not seen."""

    def judged(
        base: str,
        source_id: str | None = None,
        rejection: Rejection | None = None,
        sample: Sample | None = None,
        image_paths: tuple[str, ...] = (),
    ) -> PoolRow:
        return PoolRow(row.row, row.line, row.text, base, source_id, sample, image_paths, rejection)

    if row.error:
        detail = f"{row.error}; save the file as UTF-8"
        return judged(text_key(row.text), rejection=Rejection(RejectionReason.MALFORMED_ROW, detail))
    parsed = parse_row(row.text, row.row)
    if parsed.sample is None:
        return judged(text_key(row.text), parsed.source_id, parsed.rejection)
    references = parsed.sample.images
    resolved = [images.resolve(reference) for reference in references]
    paths = tuple(found.path or name for found, name in zip(resolved, references, strict=True))
    base = content_key(parsed.sample, paths)
    rejection = next((found.rejection for found in resolved if found.rejection), None)
    if rejection:
        return judged(base, parsed.source_id, rejection)
    return judged(base, parsed.source_id, sample=parsed.sample, image_paths=paths)


def _digested(chunks: Iterator[bytes], digest: "hashlib._Hash") -> Iterator[bytes]:
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def _walk(folder: UPath, below: str, excluded: frozenset[str]) -> Iterator[str]:
    """Paths of the shard files under ``folder``, each preceded by ``below``."""
    for name, is_folder in _entries(folder):
        if name.startswith("."):
            continue
        if not is_folder:
            if name.lower().endswith(SHARD_SUFFIXES):
                yield below + name
        elif _identity(folder / name) not in excluded and not (folder / name / STORE_MARK).exists():
            yield from _walk(folder / name, f"{below}{name}/", excluded)


def _entries(folder: UPath) -> list[tuple[str, bool]]:
    """Name of every file (False) and folder (True) in ``folder``; links to folders, sockets etc. left out."""
    if is_local(folder):
        with os.scandir(folder.path) as entries:
            return [
                (entry.name, entry.is_dir(follow_symlinks=False))
                for entry in entries
                if (_may_be_a_shard(entry) if entry.is_symlink() else entry.is_file() or entry.is_dir())
            ]
    own_name = folder.path.strip("/")
    listed = [
        (info["name"].strip("/"), info["type"] == "directory")
        for info in folder.fs.ls(folder.path, detail=True)
    ]
    # A store may list the folder's own marker object among what it holds.
    return [(posixpath.basename(name), is_folder) for name, is_folder in listed if name != own_name]


def _may_be_a_shard(link: "os.DirEntry[str]") -> bool:
    """Whether a link leads to a file, or nowhere: then it is a shard that fails, and not one that is gone."""
    return not os.path.isdir(link.path)  # noqa: PTH112 - false also where the link leads in a circle


def _is_folder(path: UPath) -> bool:
    return os.path.isdir(path.path) if is_local(path) else bool(path.is_dir())  # noqa: PTH112 - ten times faster


def _identity(folder: UPath) -> str:
    if is_local(folder):
        return os.path.realpath(folder.path)
    return f"{folder.protocol}:{folder.path.strip('/')}"
