"""Image bytes to pixels, refusing what cannot or should not be decoded."""

import io
import warnings
from functools import cache

from PIL import Image, ImageOps, UnidentifiedImageError

DEFAULT_MAX_PIXELS = 50_000_000
"""Larger images are refused before their pixels are read: 50 megapixels decode to 150 MB."""


MAX_ROW_PIXELS = 4 * DEFAULT_MAX_PIXELS
"""The images of a row may have this many pixels together, which takes about 2 GB while they are processed."""


class UndecodableImageError(ValueError):
    """The bytes are not an image that Pillow reads completely."""


class ImageTooLargeError(ValueError):
    """The image has more pixels than the limit, alone or with those before it in its row."""


MAX_ASPECT_RATIO = 200
"""A longer strip is refused: processors enlarge its short side first, which takes gigabytes."""

# Formats that pools contain and that Pillow reads by itself; others would start other programs or plugins.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


@cache
def _installed_formats() -> tuple[str, ...]:
    """Those of the formats that this build of Pillow has."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def decode_image(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode to RGB in the orientation that its EXIF tag asks for, as Transformers' ``load_image`` does.

    Raises:
        UndecodableImageError: Not an image of a known format, or a truncated or damaged one.
        ImageTooLargeError: More than ``max_pixels`` pixels or too long a strip; read from the header only.
    """
    try:
        # Pillow's own warning about large images is superseded by the explicit limit.
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(data), formats=_installed_formats())
            _check_size(*image.size, max_pixels)
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except (ImageTooLargeError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(
            f"far more than {max_pixels:,} pixels, which are decoded at most: resize the image"
        ) from error
    except UnidentifiedImageError as error:
        # Pillow's own sentence names the buffer by its address, which is another one each time.
        raise UndecodableImageError(f"not an image of a known format; it starts with {data[:8]!r}") from error
    # On damaged data Pillow's decoders raise whatever the format's library happens to: over a dozen types.
    except Exception as error:
        raise UndecodableImageError(
            f"not an image that can be read ({type(error).__name__}: {str(error)[:200]}); it starts with "
            f"{data[:8]!r}"
        ) from error


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
