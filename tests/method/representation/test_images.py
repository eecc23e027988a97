"""Decoding refuses what it should, by type."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from scalselect_assets.method.representation.images import (
    ImageTooLargeError,
    UndecodableImageError,
    decode_image,
)
from tests.conftest import png_bytes


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(content: bytes) -> bytes:
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(header) + chunk(b"IDAT")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_comes_out_as_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert decode_image(encoded(Image.new(mode, (5, 4)), kind)).mode == "RGB"


def test_the_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert decode_image(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (4, 8)


@pytest.mark.parametrize(
    "data", [b"", b"hello", png_bytes(1)[:-30], png_bytes(1)[:20], b"\xff\xd8\xff" + bytes(50)], ids=range(5)
)
def test_what_is_no_whole_image_is_undecodable(data: bytes) -> None:
    with pytest.raises(UndecodableImageError):
        decode_image(data)


@pytest.mark.parametrize("kind", ["AVIF", "TIFF", "WEBP", "GIF", "JPEG", "JPEG2000"])
def test_damaged_files_of_every_kind_are_undecodable_or_decoded(kind: str) -> None:
    whole = encoded(Image.new("RGB", (40, 30), "red"), kind)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for position in rng.integers(0, len(data), 6):
            data[position] = rng.integers(256)
        try:
            decode_image(bytes(data))
        except (UndecodableImageError, ImageTooLargeError):
            refused += 1
    assert refused > 0


def test_a_refusal_reads_the_same_each_time() -> None:
    """It stands in the rejected rows, whose hash decides whether later steps are stale."""
    for data in (b"not an image", b"", png_bytes(1)[:-30]):
        with pytest.raises(UndecodableImageError) as refusal:
            decode_image(data)
        assert " at 0x" not in str(refusal.value)


def test_a_format_that_starts_another_program_is_not_tried() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(UndecodableImageError, match="known format"):
        decode_image(postscript)


def test_a_very_long_strip_is_refused() -> None:
    assert decode_image(encoded(Image.new("L", (200, 1)), "PNG")).size == (200, 1)
    with pytest.raises(ImageTooLargeError, match="the longer side"):
        decode_image(encoded(Image.new("L", (1, 201)), "PNG"))


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (100_000, 100_000), (11, 10)])
def test_an_image_beyond_the_limit_is_refused_from_its_header(width: int, height: int) -> None:
    with pytest.raises(ImageTooLargeError, match="pixels"):
        decode_image(png_header(width, height), max_pixels=109)
