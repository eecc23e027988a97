"""WebDataset tar shards: the files of one base name are one row.

A sample's key is its files' path up to the first dot of the name, what follows is the field, and the files of
a sample stand together. The field ``json`` is the row. Images are named in it by their field (``0.jpg``), by
their file's name, or by another name each; where it names none, all image fields are its images. They are
never unpacked: an image is read from its place in the file.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, BinaryIO

from scalselect_assets.method.representation.rejection import RejectionReason
from scalselect_assets.resources.forms.embedded import Address, Extraction
from scalselect_assets.resources.forms.form import Digest, KeptFile, ShardFile, read_unpacked
from scalselect_assets.resources.row_images import IMAGE_SUFFIXES, MEDIA_SUFFIXES, RowError
from scalselect_assets.resources.row_layout import lay_out
from scalselect_assets.resources.shard_reader import Container, RowText, ShardFormatError
from scalselect_assets.resources.written_json import NotJsonError, decode, encode

_MEMBER = re.compile(r"(?s)((?:.*/)?[^./][^./]*)\.([^/]+)")


@dataclass(frozen=True, slots=True)
class _File:
    """One file in the archive: its field, its name, and where its bytes lie."""

    field: str
    name: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class _Packed:
    """The samples of one archive, with the places of their images."""

    images: list[list[_File]] = field(default_factory=list)


@dataclass(frozen=True)
class Tar:
    """A tar file, not compressed."""

    name: str = "tar"
    suffixes: tuple[str, ...] = (".tar",)

    def rows(self, file: ShardFile, digest: Digest | None = None) -> Iterator[RowText]:
        """Every row, by the rules of `Form.rows`; a row's line is its number."""
        if digest is not None:
            file.digest(digest)
        n_rows = 0
        with file.open() as stream:
            for number, (key, files) in enumerate(_samples(stream, file)):
                images = _image_files(files)
                data = tuple(_bytes(stream, image) for image in images)
                n_rows += _described(files) is not None
                yield _row_text(stream, key, files, images, data, Address(file.name, number, 0))
        if not n_rows:
            msg = (
                f"{file}: the archive holds no rows: no sample has a json. Add the rows as WebDataset has "
                "them, or, if it packs the images of other shards, unpack it and name it in `ignore`."
            )
            raise ShardFormatError(msg)

    def container(self, file: ShardFile) -> Container:  # noqa: ARG002 - of the protocol
        """An archive's rows are written as lines."""
        return "lines"

    def read_image(self, file: ShardFile, version: str, address: Address) -> bytes:
        """An image, by the rules of `Form.read_image`; the archive's headers are read once."""
        packed_away = False

        def read(packed: _Packed) -> bytes:
            nonlocal packed_away
            files = packed.images[address.row] if address.row < len(packed.images) else []
            packed_away = address.place >= len(files)
            if packed_away:
                return b""
            with file.open() as stream:
                return _bytes(stream, files[address.place])

        data = _PACKED.get(file, version, lambda: _read_headers(file), read)
        return read_unpacked(self, file, version, address) if packed_away else data


_PACKED = KeptFile()


def _read_headers(file: ShardFile) -> _Packed:
    packed = _Packed()
    with file.open() as stream:
        for _, files in _samples(stream, file):
            packed.images.append(_image_files(files))
    return packed


def _samples(stream: BinaryIO, file: ShardFile) -> Iterator[tuple[str, list[_File]]]:
    """Key and files of each sample.

    Raises:
        ShardFormatError: The file is no tar archive, or is cut off.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for key, group in groupby(_files(archive), key=lambda found: found[0]):
                yield key, [member for _, member in group]
    except (tarfile.TarError, EOFError) as error:
        msg = (
            f"{file}: the file is not an uncompressed tar archive, or is cut off ({error}). Write or copy it "
            "again; unpack a compressed one first."
        )
        raise ShardFormatError(msg) from error


def _files(archive: tarfile.TarFile) -> Iterator[tuple[str, _File]]:
    for member in archive:
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile would remember every member
        found = _MEMBER.fullmatch(member.name)
        if found and member.isreg() and not member.issparse():
            yield found[1], _File(found[2].lower(), member.name, member.offset_data, member.size)


def _described(files: list[_File]) -> _File | None:
    """The file that holds the row."""
    return next((file for file in files if file.field.split(".")[-1] == "json"), None)


def _image_files(files: list[_File]) -> list[_File]:
    return [file for file in files if file.field.endswith(_endings(IMAGE_SUFFIXES))]


def _endings(suffixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(suffix.removeprefix(".") for suffix in suffixes)


def _bytes(stream: BinaryIO, file: _File) -> bytes:
    stream.seek(file.start)
    return stream.read(file.size)


def _row_text(
    stream: BinaryIO,
    key: str,
    files: list[_File],
    images: list[_File],
    data: tuple[bytes, ...],
    first: Address,
) -> RowText:
    number = first.row
    described = _described(files)
    raw = _bytes(stream, described) if described else b"{}"
    try:
        text = raw.decode()
        value = _as_row(decode(text))
    except UnicodeDecodeError:
        error = f"the json of sample {key!r} is not UTF-8; save it as UTF-8"
        return RowText(number, raw.decode(errors="backslashreplace"), number + 1, error)
    except NotJsonError:
        return RowText(number, text, number + 1)  # the reader of the row refuses it
    if not isinstance(value, dict):
        return RowText(number, text, number + 1)
    extraction = Extraction(first.shard, number)
    extraction.images.extend(data)
    row: dict[str, Any] = extraction.of(value)
    row.setdefault("id", key)
    if any(file.field.endswith(_endings(MEDIA_SUFFIXES)) for file in files):
        row.setdefault("videos", [file.name for file in files if file not in images and file != described])
    _name_images(row, key, images, first)
    return RowText(number, encode(row), number + 1, images=tuple(extraction.images))


def _as_row(value: object) -> object:
    """The row of a sample, even if the sample's JSON is only the list of turns."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {"conversations" if "from" in value[0] else "messages": value}
    return value


def _name_images(row: dict[str, Any], key: str, images: list[_File], first: Address) -> None:
    """Put addresses in the places where a row names the images that lie beside it."""
    addresses = [str(Address(first.shard, first.row, place)) for place in range(len(images))]
    if not images:
        return
    try:
        named = lay_out(row).images
    except RowError as error:
        if error.reason is not RejectionReason.UNREAD_IMAGE:
            return  # the reader of the row refuses it
        named = ()
    if not named:
        row["images"] = addresses
        return
    known: dict[str, str] = {}
    for file, address in zip(images, addresses, strict=True):
        names = (file.field, f"{key}.{file.field}", file.name, file.name.rsplit("/", 1)[-1])
        known |= dict.fromkeys((name.lower() for name in names), address)
    found: list[str | None] = [known.get(image.name.lower()) for image in named]
    if not any(found) and len(named) == len(images):
        found = list(addresses)
    for image, place in reversed(list(zip(named, found, strict=True))):
        if place is not None:
            for slot in image.slots:
                slot.put(place)


TAR = Tar()
