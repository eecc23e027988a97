"""Thumbnails are small, and made under the limits that hold for every image of the pool."""

import io

import pytest
from PIL import Image

from scalselect_assets.method.representation.images import ImageTooLargeError, UndecodableImageError
from scalselect_assets.report.pictures import MAX_SIDE, thumbnail
from tests.conftest import png_bytes


@pytest.mark.parametrize(
    ("size", "expected"), [((1024, 512), (256, 128)), ((100, 400), (64, 256)), ((48, 40), (48, 40))]
)
def test_the_longer_side_is_bounded_and_small_images_stay(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    made = thumbnail(png_bytes(1, size), "Noise")
    assert made.data is not None
    with Image.open(io.BytesIO(made.data)) as image:
        assert (image.format, image.size) == ("JPEG", expected)
    assert (made.width, made.height, made.alt, made.problem) == (*expected, "Noise", None)
    assert max(expected) <= MAX_SIDE


def test_the_same_image_gives_the_same_bytes() -> None:
    assert thumbnail(png_bytes(2, (640, 480)), "x") == thumbnail(png_bytes(2, (640, 480)), "x")


def test_what_the_method_would_not_decode_is_refused() -> None:
    with pytest.raises(ImageTooLargeError, match="at most 1,000"):
        thumbnail(png_bytes(1), "x", max_pixels=1000)
    with pytest.raises(UndecodableImageError):
        thumbnail(b"no image", "x")
