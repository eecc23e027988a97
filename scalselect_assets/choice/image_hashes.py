"""Perceptual hashes of images: 64 bits that a picture keeps when it is stored again or made smaller.

The hash is ImageHash's `phash` (low frequencies of a 32 × 32 grey picture, above their median or not), of the
picture as the model sees it (`method.representation.images`). Distances are even, as half of the bits
are set. Measured on photographs and drawings: 0 to 2 after JPEG at quality 60, halving or doubling; up to 6
where 1 % was cropped at each side and up to 10 at 2 %; different photographs differed by more than 13.
Drawings made of the same few parts may have the same hash though they differ.

Costs: 1.5 ms for a picture of 400 × 100 (0.7 decoding, 0.8 hashing), a few for a photograph, once: they are
remembered in the store by shard, with the version of the shard that they are of, and by content for the next.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scalselect_assets.method.representation.images import (
    DEFAULT_MAX_PIXELS,
    ImageTooLargeError,
    UndecodableImageError,
    decode_image,
)
from scalselect_assets.recording.columns import Column, Table, polars_schema
from scalselect_assets.resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore

IMAGE_HASHES: Final = "image_hashes"
KIND: Final = "imagehash.phash-8x8-1"
"""The kind of the remembered hashes; a hash of another kind is computed again."""
_FLAT_RANGE: Final = 8  # grey levels; less is one colour, whose hash is the noise of its compression
_BLOCK_CELLS: Final = 4_000_000  # distances computed at a time, of 8 bytes each on the way

HASHES: Table = {
    "image": Column(pl.String(), "Image path relative to the image root."),
    "image_sha256": Column(pl.String(), "SHA-256 of the image's bytes; null where it cannot be opened."),
    "phash": Column(
        pl.UInt64(), "Perceptual hash; null where it cannot be decoded or shows one colour only."
    ),
}


def perceptual_hash(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> int | None:
    """The 64 bits of an image, or none for a picture of one colour, which all have the same.

    Raises:
        UndecodableImageError: Not an image, or a damaged one.
        ImageTooLargeError: More than ``max_pixels`` pixels, or too long a strip.
    """
    import imagehash

    image = decode_image(data, max_pixels)
    # Averaged first, so that a few specks do not make a picture of one colour another one.
    grey = np.asarray(image.convert("L").resize((32, 32)))
    if np.ptp(grey) < _FLAT_RANGE:
        return None
    return int(str(imagehash.phash(image)), 16)


def shard_hashes(
    artifacts: ArtifactStore,
    shard: str,
    raw_version: str,
    images: Iterable[str],
    open_image: Callable[[str], bytes],
) -> tuple[pl.DataFrame, int]:
    """The hashes of a shard's images, taken from the store where they are known, and kept there.

    A shard's version covers its images, so for the same version nothing is opened; for another one, images
    are read, and decoded only where their bytes are new.

    Args:
        artifacts: The store.
        shard: Partition key.
        raw_version: Data version of the shard's raw samples.
        images: Their image paths; repeated ones count once.
        open_image: From such a path to bytes, within the image root.

    Returns:
        A frame of `HASHES` with one row per path, sorted, and how many images were decoded for it.

    Raises:
        OSError: An image cannot be read for reasons other than that it is not there.
    """
    wanted = sorted(set(images))
    known = read_hashes(artifacts, IMAGE_HASHES, shard)
    if known is not None and known[1]["raw_samples"] == raw_version and known[0]["image"].to_list() == wanted:
        return known[0], 0
    by_content = {} if known is None else hashes_by_content(known[0])
    n_decoded = 0
    records: list[tuple[str, str | None, int | None]] = []
    for image in wanted:
        try:
            data = open_image(image)
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            records.append((image, None, None))  # the shard's next reading rejects its rows
            continue
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 not in by_content:
            n_decoded += 1
            by_content[sha256] = _hash_or_none(data)
        records.append((image, sha256, by_content[sha256]))
    frame = pl.DataFrame(records, schema=polars_schema(HASHES), orient="row")
    header = {"kind": KIND, "raw_samples": raw_version}
    artifacts.write_frame(IMAGE_HASHES, frame, header, shard)
    return frame, n_decoded


def nearest(
    hashes: NDArray[np.uint64], others: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each hash the place of the nearest of the others, the first of equals, and the distance in bits.

    Costs: one comparison for each pair, in blocks of some 30 MB.

    Args:
        hashes: (n,) uint64.
        others: (m,) uint64, at least one.

    Returns:
        (n,) int64 places and (n,) int64 Hamming distances.
    """
    places = np.empty(len(hashes), np.int64)
    distances = np.empty(len(hashes), np.int64)
    step = max(1, _BLOCK_CELLS // len(others))
    for start in range(0, len(hashes), step):
        block = slice(start, start + step)
        apart = np.bitwise_count(hashes[block, None] ^ others[None, :])
        places[block] = apart.argmin(axis=1)
        distances[block] = apart.min(axis=1)
    return places, distances


def hashes_by_content(frame: pl.DataFrame) -> dict[str, int | None]:
    """The hash of each image of a frame of `HASHES` that could be opened, by the SHA-256 of its bytes."""
    opened = frame.filter(pl.col("image_sha256").is_not_null())
    return dict(opened.select("image_sha256", "phash").iter_rows())


def read_hashes(
    artifacts: ArtifactStore, asset: str, shard: str | None = None
) -> tuple[pl.DataFrame, dict[str, str]] | None:
    """A remembered frame of `HASHES` and its header; none where it is missing, damaged or of another kind."""
    try:
        frame, header = artifacts.read_frame(asset, shard)
    except (ArtifactMissingError, ArtifactCorruptError):
        return None
    if header.get("kind") != KIND or frame.schema != polars_schema(HASHES):
        return None
    return frame, header


def _hash_or_none(data: bytes) -> int | None:
    try:
        return perceptual_hash(data)
    # Such rows have no vector either, and stand with the reason among the rejected rows.
    except (UndecodableImageError, ImageTooLargeError):
        return None
