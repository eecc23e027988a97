"""Decoding of image bytes to pixels, with a refusal of images that cannot or should not be decoded."""

import io
import warnings
from functools import cache

from PIL import Image, ImageOps, UnidentifiedImageError

from scalselect_assets.method.representation.not_images import describe
from scalselect_assets.method.representation.rejection import RejectionReason

DEFAULT_MAX_PIXELS = 50_000_000
"""Larger images are refused before their pixels are read: 50 megapixels decode to 150 MB."""


MAX_ROW_PIXELS = 4 * DEFAULT_MAX_PIXELS
"""The images of a row may have this many pixels together; processing them takes about 2 GB."""


class UndecodableImageError(ValueError):
    """The bytes are not an image that Pillow reads completely."""

    reason = RejectionReason.UNDECODABLE_IMAGE


class DeepImageError(UndecodableImageError):
    """The pixels have more than 8 bits, and only the pool's owner can decide how to reduce them to 8."""

    reason = RejectionReason.DEEP_IMAGE


class ImageTooLargeError(ValueError):
    """The image has more pixels than the limit, alone or with those before it in its row."""

    reason = RejectionReason.IMAGE_TOO_LARGE


MAX_ASPECT_RATIO = 200
"""A longer strip is refused: processors enlarge its short side first, which takes gigabytes."""

# Formats that pools contain and that Pillow reads by itself; others would start other programs or plugins.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


@cache
def _installed_formats() -> tuple[str, ...]:
    """The listed formats that this build of Pillow supports."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def decode_image(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode to RGB in the orientation that its EXIF tag asks for, as Transformers' ``load_image`` does.

    Raises:
        DeepImageError: The image is one grey channel of 16 or 32 bits or of floats. Pillow, and so every
            trainer, would clip it to white or black.
        UndecodableImageError: The bytes are no image of a known format, or are truncated or damaged.
        ImageTooLargeError: The image has more than ``max_pixels`` pixels or is too long a strip. Only the
            header is read for this check.
    """
    try:
        # Pillow's own warning about large images is superseded by the explicit limit.
        with warnings.catch_warnings(action="ignore"):
            image = _open(data)
            _check_size(*image.size, max_pixels)
            _check_depth(image.mode)
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except (ImageTooLargeError, DeepImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(
            f"far more than {max_pixels:,} pixels, which are decoded at most: resize the image"
        ) from error
    except UnidentifiedImageError as error:
        # Pillow's own message contains the buffer's address, which changes each time.
        raise UndecodableImageError(describe(data)) from error
    # On damaged data Pillow's decoders raise over a dozen types of errors, depending on the format.
    except Exception as error:
        raise UndecodableImageError(
            f"not an image that can be read ({type(error).__name__}: {str(error)[:200]}); it starts with "
            f"{data[:8]!r}"
        ) from error


def _open(data: bytes) -> Image.Image:
    """Open an image and read its header."""
    try:
        return Image.open(io.BytesIO(data), formats=_installed_formats())
    except ValueError as error:
        # Pillow refuses a PNG with a large text chunk, although the picture itself is fine.
        if "MAX_TEXT" not in str(error):
            raise
        return Image.open(io.BytesIO(_without_text(data)), formats=("PNG",))


_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")


def _without_text(png: bytes) -> bytes:
    """A PNG without its text chunks; every other chunk is unchanged."""
    kept = [png[:8]]
    position = 8
    while position + 8 <= len(png):
        length = int.from_bytes(png[position : position + 4])
        end = position + 12 + length
        if png[position + 4 : position + 8] not in _TEXT_CHUNKS:
            kept.append(png[position:end])
        position = end
    return b"".join(kept)


def _check_depth(mode: str) -> None:
    if mode == "F" or mode.startswith("I"):
        kind = "floats" if mode == "F" else "16 or 32 bits"
        raise DeepImageError(
            f"its pixels are {kind} (mode {mode}), which Pillow clips to white or black, here and in every "
            "trainer: choose the range that matters and write it as 8 bits"
        )


class PixelBudget:
    """The pixels that the images of one row may have together, however small each of them is."""

    def __init__(self, max_pixels: int) -> None:
        """Begin a row: twelve photographs of 12 megapixels fit the default, and sixteen of 50 do not."""
        self._most = self._left = max(MAX_ROW_PIXELS, 4 * max_pixels)

    def spend(self, image: Image.Image) -> None:
        """Count one more image of the row.

        Raises:
            ImageTooLargeError: The images so far have more pixels than a row may have.
        """
        self._left -= image.width * image.height
        if self._left < 0:
            raise ImageTooLargeError(
                f"with it, the images of the row have more than {self._most:,} pixels together: use fewer or "
                "smaller ones"
            )


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"{width} × {height} pixels; at most {max_pixels:,} are decoded: resize the image"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageTooLargeError(
            f"{width} × {height} pixels; the longer side may be {MAX_ASPECT_RATIO} times the shorter one"
        )
