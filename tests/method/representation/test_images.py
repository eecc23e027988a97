"""Decoding refuses what it should, by type."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from scalselect_assets.method.representation.images import (
    DeepImageError,
    ImageTooLargeError,
    UndecodableImageError,
    decode_image,
)
from tests.conftest import png_bytes


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(content: bytes) -> bytes:
    return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))


def png_header(width: int, height: int, bits: int = 8, colours: int = 2) -> bytes:
    """A PNG that claims a size and has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(header) + chunk(b"IDAT")


def png_file(width: int, height: int, bits: int, colours: int, rows: bytes) -> bytes:
    """A PNG of rows that are given as they are stored."""
    start = png_header(width, height, bits, colours)[: -len(chunk(b"IDAT"))]
    return start + chunk(b"IDAT" + zlib.compress(rows)) + chunk(b"IEND")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_comes_out_as_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert decode_image(encoded(Image.new(mode, (5, 4)), kind)).mode == "RGB"


@pytest.mark.parametrize(
    ("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF"), ("F", "TIFF"), ("I;16B", "TIFF")]
)
def test_more_than_eight_bits_of_grey_are_refused_and_not_clipped(mode: str, kind: str) -> None:
    with pytest.raises(DeepImageError, match="write it as 8 bits"):
        decode_image(encoded(Image.new(mode, (5, 4)), kind))


def test_a_png_of_sixteen_bits_a_colour_keeps_its_picture() -> None:
    """Pillow takes the high byte of each, so nothing is clipped."""
    row = b"\0" + struct.pack(">6H", 0x8000, 0, 65535, 300, 0x1234, 0xFFFF)
    image = decode_image(png_file(2, 2, 16, 2, row * 2))

    assert image.getpixel((0, 0)) == (0x80, 0, 255)
    assert image.getpixel((1, 1)) == (1, 0x12, 255)


def test_a_png_with_a_long_comment_is_read() -> None:
    from PIL.PngImagePlugin import PngInfo

    comments = PngInfo()
    comments.add_text("parameters", "x" * (2 << 20), zip=True)
    comments.add_text("more", "y" * (2 << 20))
    picture = Image.new("RGB", (5, 4), "red")

    assert decode_image(encoded(picture, "PNG", pnginfo=comments)).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "video"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x"/>', "SVG"),
        (b"\n<!DOCTYPE html><html><body>404 <img>", "web page"),
        (b"%PDF-1.7", "PDF"),
        (b"", "empty"),
    ],
)
def test_what_stands_in_place_of_an_image_is_named(data: bytes, what: str) -> None:
    with pytest.raises(UndecodableImageError, match=what):
        decode_image(data)


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
