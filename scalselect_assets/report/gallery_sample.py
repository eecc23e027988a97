"""A sample that the report shows, and the picture of its attention."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class GallerySample:
    """A sample that the report shows, as an `Overlay` needs it."""

    sample_key: str
    shard: str
    row: int
    text: str
    """The row's JSON text, verbatim."""
    images: tuple[str, ...]
    """Its images, relative to the image root."""
    image_sha256: tuple[str, ...]
    """SHA-256 of the bytes that were embedded, one for each image."""
    fingerprint: str
    """Fingerprint of the model that it was embedded with."""


Overlay: TypeAlias = Callable[[GallerySample], bytes | None]
"""The picture of where the instruction's attention lies, in any format that images may have; none if there
is none."""
