"""Extraction of images from a row: the row's text then holds an address in the place of each image.

Base64 in JSON (data URIs, ``bytes``) and binary cells of tables are treated alike. An image's address is
``<shard>#<row>/<n>``: the shard's path from the pool's folder, the row from 0, and the image's place among
everything embedded in that row. The address depends on nothing but the file, so it can be opened later.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from scalselect_assets.resources.row_images import ADDRESS

_DATA_URI = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w.+=-]+)*;base64,", re.IGNORECASE)
_BYTES_KEYS = ("bytes", "base64")
_SAID = ("content", "value", "text", "system")
"""Members whose strings are spoken text, never an image."""
_SHORTEST = 64
"""The shortest Base64 image. A shorter string under ``bytes`` is a number or a name."""


@dataclass(frozen=True, slots=True)
class Address:
    """The address of an embedded image.

    Attributes:
        shard: The shard's path from the pool's folder.
        row: Number of the row, from 0.
        place: Number of the image among everything embedded in the row, from 0.
    """

    shard: str
    row: int
    place: int

    def __str__(self) -> str:
        return f"{self.shard}#{self.row}/{self.place}"


def address_of(reference: str) -> Address | None:
    """The address in a reference; None for a path."""
    found = ADDRESS.fullmatch(reference)
    return found and Address(found["shard"], int(found["row"]), int(found["place"]))


def may_hold_images(text: str) -> bool:
    """Whether a row's JSON text may have images inside, without reading it as JSON."""
    return '"data:' in text or '"bytes"' in text or '"base64"' in text


class Extraction:
    """Takes the embedded images out of the values of one row."""

    def __init__(self, shard: str, row: int) -> None:
        self._shard, self._row = shard, row
        self.images: list[bytes] = []

    def of(self, value: Any, key: str | None = None) -> Any:
        """``value`` with an address in the place of each image; members that are null are left out of tables.

        Args:
            value: Content of a JSON row or of a table's cell.
            key: The member or column that holds it.
        """
        match value:
            case bytes() | bytearray() | memoryview():
                return self._address(bytes(value))
            case str() if key not in _SAID and value[:5].lower() == "data:":
                data = from_data_uri(value)
                return value if data is None else self._address(data)
            case list() | tuple():
                return [self.of(item, key) for item in value]
            case dict():
                return self._of_object(value)
            case _:
                return value

    def _of_object(self, value: dict[str, Any]) -> Any:
        for key in _BYTES_KEYS:
            held = value.get(key)
            data = held if isinstance(held, bytes) else _from_base64(held)
            if data is not None:
                address = self._address(data)
                # Hugging Face's image cell is its bytes and a name for them; a part of a turn is more.
                return address if set(value) <= {key, "path"} else {**value, key: address}
        return {key: self.of(item, key) for key, item in value.items()}

    def _address(self, data: bytes) -> str:
        self.images.append(data)
        return str(Address(self._shard, self._row, len(self.images) - 1))


def from_data_uri(reference: str) -> bytes | None:
    """The bytes that a data URI holds; None for anything else, a broken one too."""
    found = _DATA_URI.match(reference)
    return _decoded(reference[found.end() :]) if found else None


def to_data_uri(data: bytes) -> str:
    """Inverse of ``from_data_uri``; the type follows from the image's first bytes."""
    return f"data:{media_type(data)};base64,{base64.b64encode(data).decode()}"


_SIGNATURES = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
    (b"\0\0\0\x0cjP  ", "image/jp2"),
)


def media_type(data: bytes) -> str:
    """The type of an image by its first bytes."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "image/avif"
    return next((name for start, name in _SIGNATURES if data.startswith(start)), "application/octet-stream")


def image_suffix(data: bytes, name: str = "") -> str:
    """A file suffix for an image, by its bytes or else by its name."""
    kind = media_type(data)
    if kind.startswith("image/"):
        return {"image/jpeg": ".jpg"}.get(kind, f".{kind.removeprefix('image/')}")
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if suffix[1:].isascii() and suffix[1:].isalnum() and len(suffix) <= 6 else ""


def _from_base64(value: object) -> bytes | None:
    if not isinstance(value, str) or len(value) < _SHORTEST:
        return None
    return from_data_uri(value) or _decoded(value)


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode("".join(text.split()), validate=True) or None
    except (binascii.Error, ValueError):
        return None
