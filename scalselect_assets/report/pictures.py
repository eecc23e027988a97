"""Thumbnails: any image that the method would decode, small enough for a page."""

import io
from typing import Final

from PIL import Image

from scalselect_assets.method.representation.images import DEFAULT_MAX_PIXELS, decode_image
from scalselect_assets.report.content import Picture

MAX_SIDE: Final = 256
_QUALITY: Final = 80  # of 100; at this size, some 10 kB for a photograph


def thumbnail(data: bytes, alt: str, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Picture:
    """A JPEG of at most 256 pixels a side; smaller images keep their size.

    Args:
        data: Bytes of the image.
        alt: Its content in words.
        max_pixels: Larger images are refused before they are decoded.

    Raises:
        UndecodableImageError: As `decode_image`.
        ImageTooLargeError: As `decode_image`.
    """
    image = decode_image(data, max_pixels)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return Picture(alt, buffer.getvalue(), *image.size)
