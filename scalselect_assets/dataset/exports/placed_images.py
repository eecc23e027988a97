"""The places of an export's images: in the pool, copied or linked beside the files, or inside the files.

The bytes of every image that is read are compared with the embedded ones, so that no trainer gets another
picture than the chosen one.
"""

import errno
import hashlib
from pathlib import Path
from typing import BinaryIO

from upath import UPath

from scalselect_assets.dataset.exports.base import (
    PlacedImage,
    Refusal,
    RefusalReason,
    safe_suffix,
    write_line,
)
from scalselect_assets.dataset.exports.rows import ExportRow
from scalselect_assets.declaration.export_specs import ExportSpec
from scalselect_assets.method.representation.rejection import Rejection
from scalselect_assets.resources.files import is_local
from scalselect_assets.resources.folders import NewFolder, WrittenFile
from scalselect_assets.resources.forms.embedded import address_of, image_suffix
from scalselect_assets.resources.sample_source import SampleSource

IMAGES = "images.jsonl"
IMAGE_FOLDER = "images"


class ExportError(RuntimeError):
    """An export cannot be made as declared; the message says what to change."""


def require_links(images: UPath, target: UPath) -> None:
    """Require that files can be hard-linked between two places; nothing is linked.

    Raises:
        ExportError: Files cannot be hard-linked between them.
    """
    remedy = "declare `images: copied`, or put pool and store on one file system"
    if not (is_local(images) and is_local(target)):
        raise ExportError(
            f"images of {images} cannot be hard-linked into {target}: both have to be on a local disk; "
            f"{remedy}"
        )
    there = next(folder for folder in (Path(target.path), *Path(target.path).parents) if folder.exists())
    if Path(images.path).exists() and there.stat().st_dev != Path(images.path).stat().st_dev:
        raise ExportError(
            f"images of {images} cannot be hard-linked into {target}: they are on two file systems; {remedy}"
        )


class Images:
    """Images that stay in the pool."""

    def __init__(self, source: SampleSource) -> None:
        self._folder = source.images_folder()
        self._root = source.image_files()
        self.base = str(self._folder)

    def place(self, row: ExportRow) -> tuple[PlacedImage, ...] | Refusal:
        """The row's images, or the refusal of a row without usable images."""
        for path in row.images:
            if isinstance(rejection := self._root.state(path), Rejection):
                return Refusal(RefusalReason.IMAGE_MISSING, f"{row.where()}: {rejection.detail}")
        return tuple(
            PlacedImage(path, sha256) for path, sha256 in zip(row.images, row.image_sha256, strict=True)
        )

    def is_there(self, reference: str) -> bool:
        """Whether a reference leads to an image."""
        return not isinstance(self._root.state(reference), Rejection)

    def write_list(self, folder: NewFolder) -> None:
        """Write the list of the images beside the files, if there are any."""

    def _read(self, row: ExportRow) -> list[bytes] | Refusal:
        """The images' bytes, or a refusal if an image is missing or differs from the embedded one."""
        contents = []
        for path, sha256 in zip(row.images, row.image_sha256, strict=True):
            try:
                contents.append(self._root.read(path))
            except (FileNotFoundError, PermissionError) as error:
                return Refusal(RefusalReason.IMAGE_MISSING, f"{row.where()}: {error}")
            if changed := _changed(row, path, contents[-1], sha256):
                return changed
        return contents


class EmbeddedImages(Images):
    """Images whose bytes go into the format's own files."""

    def place(self, row: ExportRow) -> tuple[PlacedImage, ...] | Refusal:
        """The row's images with their bytes, or the refusal of a row without usable images."""
        contents = self._read(row)
        if isinstance(contents, Refusal):
            return contents
        return tuple(
            PlacedImage(path, sha256, data)
            for path, sha256, data in zip(row.images, row.image_sha256, contents, strict=True)
        )


class ImagesBeside(Images):
    """Images copied or linked beside the files; images with equal content share one file."""

    def __init__(self, source: SampleSource, folder: NewFolder, *, linked: bool) -> None:
        super().__init__(source)
        self._new, self._linked = folder, linked
        self._placed: dict[tuple[str, str], str] = {}
        self.base = str(folder.target)
        if linked:
            require_links(self._folder, folder.target)

    def place(self, row: ExportRow) -> tuple[PlacedImage, ...] | Refusal:
        """The row's images, or a refusal; an image that is not beside the files yet is copied or linked."""
        named = list(zip(row.images, row.image_sha256, strict=True))
        if not all(image in self._placed for image in named):
            refusal = self._link(row) if self._linked else self._copy(row)
            if refusal is not None:
                return refusal
        return tuple(PlacedImage(self._placed[image], image[1]) for image in named)

    def is_there(self, reference: str) -> bool:
        """Whether a reference leads to an image beside the files."""
        return reference in self._new.files and self._new.path(reference).exists()

    def write_list(self, folder: NewFolder) -> None:
        """Write the list that maps each image of the pool to its file."""
        with folder.stream(IMAGES) as file:
            file.rows = 0
            for (path, sha256), name in sorted(self._placed.items()):
                size = folder.files[name].bytes
                write_line(file, {"image": path, "file": name, "sha256": sha256, "bytes": size})

    def _copy(self, row: ExportRow) -> Refusal | None:
        contents = self._read(row)
        if isinstance(contents, Refusal):
            return contents
        for path, sha256, data in zip(row.images, row.image_sha256, contents, strict=True):
            name = _name_beside(path, sha256, data)
            if name not in self._new.files:
                self._new.write(name, data)
            self._placed.setdefault((path, sha256), name)
        return None

    def _link(self, row: ExportRow) -> Refusal | None:
        """Link the row's image files; each file is read and linked while it is open."""
        for path, sha256 in zip(row.images, row.image_sha256, strict=True):
            if address_of(path) is not None:
                return self._copy(row)  # an image inside a shard has no file of its own
            try:
                file = self._root.open(path)
            except (FileNotFoundError, PermissionError) as error:
                return Refusal(RefusalReason.IMAGE_MISSING, f"{row.where()}: {error}")
            with file:
                data = file.read()
                name = _name_beside(path, sha256, data)
                if changed := _changed(row, path, data, sha256):
                    return changed
                if name not in self._new.files:
                    self._hard_link(name, path, file, WrittenFile(sha256, len(data)))
            self._placed.setdefault((path, sha256), name)
        return None

    def _hard_link(self, name: str, path: str, file: BinaryIO, known: WrittenFile) -> None:
        try:
            self._new.hard_link(name, file, known)
        except OSError as error:
            # ENOENT: the file was deleted, or the system has no /proc in which to find an open file.
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOENT):
                raise
            raise ExportError(
                f"image {path!r} cannot be hard-linked into {self._new.target} ({error.strerror}); declare "
                "`images: copied`, or put pool and store on one file system"
            ) from error


def _name_beside(path: str, sha256: str, data: bytes) -> str:
    """The name of an image beside an export's files: its hash, with the suffix of its file or its bytes."""
    suffix = safe_suffix(path) if address_of(path) is None else image_suffix(data)
    return f"{IMAGE_FOLDER}/{sha256[:2]}/{sha256}{suffix}"


def _changed(row: ExportRow, path: str, data: bytes, sha256: str) -> Refusal | None:
    """The refusal of a row with a changed image; None if the image is the embedded one."""
    if (found := hashlib.sha256(data).hexdigest()) == sha256:
        return None
    detail = (
        f"{row.where()}: image {path!r} has changed since the row was embedded (SHA-256 {found[:12]}..., "
        f"then {sha256[:12]}...); run the refresh again"
    )
    return Refusal(RefusalReason.IMAGE_CHANGED, detail)


def images_for(spec: ExportSpec, source: SampleSource, folder: NewFolder, *, embedded: bool) -> Images:
    """The images of an export, placed as its declaration says.

    Args:
        spec: The declaration.
        source: The pool.
        folder: The folder that the export is written to.
        embedded: Whether the format's own files hold the images.

    Raises:
        ExportError: Images cannot be linked.
    """
    if embedded:
        return EmbeddedImages(source)
    if spec.images == "referenced":
        return Images(source)
    return ImagesBeside(source, folder, linked=spec.images == "hardlinked")
