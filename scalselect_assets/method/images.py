"""Image bytes to pixels, refusing what cannot or should not be decoded."""

import io
import warnings

from PIL import Image, ImageOps, UnidentifiedImageError

DEFAULT_MAX_PIXELS = 50_000_000
"""Larger images are refused before their pixels are read: 50 megapixels decode to 150 MB."""


class UndecodableImageError(ValueError):
    """The bytes are not an image that Pillow reads completely."""


class ImageTooLargeError(ValueError):
    """The image has more pixels than the limit; nothing of it was decoded."""


def decode_image(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode to RGB in the orientation that its EXIF tag asks for, as Transformers' ``load_image`` does.

    Raises:
        UndecodableImageError: Not an image, or a truncated or damaged one.
        ImageTooLargeError: More than ``max_pixels`` pixels; read from the header only.
    """
    try:
        # Pillow's own warning about large images is superseded by the explicit limit.
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > max_pixels:
                raise ImageTooLargeError(
                    f"{width} × {height} pixels; at most {max_pixels:,} are decoded: resize the image"
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"{error}; at most {max_pixels:,} pixels are decoded") from error
    except UnidentifiedImageError as error:
        start = data[:8]
        raise UndecodableImageError(f"not an image that can be read; it starts with {start!r}") from error
    # Pillow's decoders raise these on damaged data, depending on the format.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        if isinstance(error, ImageTooLargeError):
            raise
        raise UndecodableImageError(f"damaged image: {error}") from error
