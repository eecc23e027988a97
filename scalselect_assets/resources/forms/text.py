"""JSON Lines and JSON arrays, plain or compressed with gzip or Zstandard.

`shard_reader` splits the rows. This module unpacks the bytes before that, and then takes images that are
embedded as Base64 out of the rows.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import zstandard

from scalselect_assets.resources.forms.embedded import Address, Extraction, may_hold_images
from scalselect_assets.resources.forms.form import Digest, ShardFile, read_unpacked
from scalselect_assets.resources.shard_reader import (
    LINES_SUFFIXES,
    Container,
    RowText,
    ShardFormatError,
    read_chunks,
    recognise,
    rows_of,
)
from scalselect_assets.resources.written_json import NotJsonError, decode, encode

_PLAIN_SUFFIXES = (".json", *LINES_SUFFIXES)


class Decompressor(Protocol):
    """A decompression object of `zlib` or `zstandard`; it ends with its frame."""

    @property
    def eof(self) -> bool:
        """Whether the frame has ended."""

    @property
    def unused_data(self) -> bytes:
        """The bytes behind the end of the frame."""

    def decompress(self, data: bytes, /) -> bytes:
        """The next bytes."""


@dataclass(frozen=True)
class TextForm:
    """A text shard.

    Attributes:
        name: Name of the form in messages.
        ending: Ending of the file's name after the suffix of the text.
        decompressor: Factory of an object that unpacks one compressed frame; None for a plain file.
        errors: Errors that the decompressor raises on bytes of another compression.
    """

    name: str
    ending: str = ""
    decompressor: Callable[[], Decompressor] | None = None
    errors: tuple[type[Exception], ...] = ()

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Endings of the files' names."""
        return tuple(f"{suffix}{self.ending}" for suffix in _PLAIN_SUFFIXES)

    def rows(self, file: ShardFile, digest: Digest | None = None) -> Iterator[RowText]:
        """Every row, by the rules of `Form.rows`, in the memory of a few chunks or the longest row."""
        with file.open() as stream:
            chunks = read_chunks(stream)
            if digest is not None:
                chunks = _digested(chunks, digest)
            try:
                for row in rows_of(self._unpacked(chunks, file), file.path):
                    yield _without_images(row, file.name) if may_hold_images(row.text) else row
            except ShardFormatError:
                for _ in chunks:  # the digest is that of the whole file
                    pass
                raise

    def container(self, file: ShardFile) -> Container:
        """The container, by the first character."""
        with file.open() as stream:
            return recognise(self._unpacked(read_chunks(stream), file), file.path)[0]

    def read_image(self, file: ShardFile, version: str, address: Address) -> bytes:
        """An embedded image, by the rules of `Form.read_image`."""
        return read_unpacked(self, file, version, address)

    def _unpacked(self, chunks: Iterator[bytes], file: ShardFile) -> Iterator[bytes]:
        if self.decompressor is None:
            yield from chunks
            return
        frame = self.decompressor()
        begun = False
        try:
            for chunk in chunks:
                data = chunk
                while data:
                    if frame.eof:
                        frame, begun = self.decompressor(), False
                    begun = True
                    yield frame.decompress(data)
                    data = frame.unused_data if frame.eof else b""
        except self.errors as error:
            msg = f"{file}: the file is not {self.name}, or is damaged ({error}). Write or copy it again."
            raise ShardFormatError(msg) from error
        if begun and not frame.eof:
            msg = f"{file}: the file is cut off: its {self.name} data does not end. Copy it again."
            raise ShardFormatError(msg)


def _without_images(row: RowText, shard: str) -> RowText:
    """A row with an address in the place of each embedded image; the same row if it has none."""
    if row.error:
        return row
    try:
        value = decode(row.text)
        extraction = Extraction(shard, row.row)
        said = extraction.of(value)
        if not extraction.images:
            return row
        return replace(row, text=encode(said), images=tuple(extraction.images))
    except (NotJsonError, RecursionError):
        return row  # the reader of the row refuses it


def _digested(chunks: Iterator[bytes], digest: Digest) -> Iterator[bytes]:
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def _gzip() -> Decompressor:
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)


def _zstd() -> Decompressor:
    return zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()


PLAIN = TextForm("JSON")
GZIP = TextForm("gzip", ".gz", _gzip, (zlib.error,))
ZSTD = TextForm("Zstandard", ".zst", _zstd, (zstandard.ZstdError,))
