"""Beside the path, by shard: samples whose pictures show nothing, one colour or noise.

Leverage prefers what is unlike the rest, and a broken scan is unlike everything; a strategy that avoids
copies prefers it even more. Rare samples are unlike the rest, too, so vectors cannot tell the two apart.
Pixels can: in a picture of noise, neighbouring pixels have nothing to do with each other. Their correlation
is below 0.1, or below 0.2 where noise was enlarged to twice its size; a page of small print has 0.35,
stripes, rings and other drawings have 0.45 and more. Nothing that shows something is removed, however rare.

Costs: each picture of a shard is decoded once, and again when the shard changes; the verdicts are
remembered.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray
from PIL import Image

from scalselect_assets.method.representation.images import (
    ImageTooLargeError,
    UndecodableImageError,
    decode_image,
)
from scalselect_assets.pool import raw_samples
from scalselect_assets.recording.columns import SELECTED_SUBSET, Column, Table, polars_schema
from scalselect_assets.resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore

NAME: Final = "contentless_pictures"
REASON: Final = "contentless_picture"
KIND: Final = "neighbours-1"
"""The method of the verdicts; verdicts of another method are made again."""

Verdict: TypeAlias = Literal["one colour", "noise"]

_MOST_SIDE = 512  # larger pictures are reduced first, which takes noise of their size away from no verdict
_LEAST_SIDE = 16
_FLAT_RANGE = 8  # grey levels
_NOISE_CORRELATION = 0.2
_SCALES = 2  # at a quarter, stripes and rings are as uncorrelated as noise

CONTENTLESS: Table = {
    "shard": SELECTED_SUBSET["shard"],
    "row": SELECTED_SUBSET["row"],
    "sample_key": SELECTED_SUBSET["sample_key"],
    "reason": Column(pl.String(), "contentless_picture."),
    "detail": Column(pl.String(), "What its pictures show: one colour or noise."),
}
_VERDICTS: Table = {
    "image": Column(pl.String(), "Image path relative to the image root."),
    "verdict": Column(pl.String(), "one colour or noise; null for every other picture."),
}


def verdict(image: Image.Image) -> Verdict | None:
    """The fault of a picture; None for one that shows something."""
    grey = image.convert("L")
    grey.thumbnail((_MOST_SIDE, _MOST_SIDE), Image.Resampling.NEAREST)
    pixels = np.asarray(grey, np.float64)
    if np.ptp(pixels) < _FLAT_RANGE:
        return "one colour"
    return "noise" if min(_correlations(pixels), default=1.0) < _NOISE_CORRELATION else None


def find(artifacts: ArtifactStore, shards: Sequence[str], open_image: Callable[[str], bytes]) -> pl.DataFrame:
    """The samples of some shards all of whose pictures show nothing, a frame of `CONTENTLESS`.

    Args:
        artifacts: The store.
        shards: Partition keys.
        open_image: From an image path to bytes, within the image root.

    Raises:
        ArtifactMissingError: A shard's raw samples are not there.
        OSError: An image cannot be read for reasons other than that it is not there.
    """
    schema = polars_schema(CONTENTLESS)
    found = [pl.DataFrame(schema=schema)]
    for shard in shards:
        frame, header = artifacts.read_frame(raw_samples.NAME, shard)
        samples = frame.filter(pl.col("reason").is_null()).select("row", "sample_key", "images")
        named = samples["images"].explode().drop_nulls().to_list()
        known = dict(_verdicts(artifacts, shard, header["data_version"], named, open_image).iter_rows())
        records = [
            (shard, row, key, REASON, ", ".join(sorted(set(said))))
            for row, key, images in samples.iter_rows()
            if images and all(said := [known[image] for image in images])
        ]
        found.append(pl.DataFrame(records, schema=schema, orient="row"))
    return pl.concat(found).sort(["shard", "row"])


def _verdicts(
    artifacts: ArtifactStore,
    shard: str,
    raw_version: str,
    images: Iterable[str],
    open_image: Callable[[str], bytes],
) -> pl.DataFrame:
    """The verdict on each picture of a shard, remembered with the version of the shard that covers them."""
    try:
        frame, header = artifacts.read_frame(NAME, shard)
        if (header.get("kind"), header.get("raw_samples")) == (KIND, raw_version):
            return frame
    except (ArtifactMissingError, ArtifactCorruptError):
        pass  # the verdicts are made again
    records = [(image, _verdict_of(image, open_image)) for image in sorted(set(images))]
    frame = pl.DataFrame(records, schema=polars_schema(_VERDICTS), orient="row")
    artifacts.write_frame(NAME, frame, {"kind": KIND, "raw_samples": raw_version}, shard)
    return frame


def _verdict_of(image: str, open_image: Callable[[str], bytes]) -> Verdict | None:
    try:
        return verdict(decode_image(open_image(image)))
    # Such rows have no vector either, and stand with the reason among the rejected rows.
    except (
        FileNotFoundError,
        PermissionError,
        IsADirectoryError,
        UndecodableImageError,
        ImageTooLargeError,
    ):
        return None


def _correlations(pixels: NDArray[np.float64]) -> list[float]:
    """Correlations of neighbouring pixels, the larger of both directions, at full and half size.

    Noise that was enlarged to twice its size is noise again at half size.
    """
    found = []
    for _ in range(_SCALES):
        if min(pixels.shape) < _LEAST_SIDE or np.ptp(pixels) < 1:
            break
        found.append(
            max(
                abs(_correlation(pixels[:, :-1], pixels[:, 1:])),
                abs(_correlation(pixels[:-1], pixels[1:])),
            )
        )
        rows, columns = (side // 2 * 2 for side in pixels.shape)
        even = pixels[:rows, :columns]
        pixels = (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4
    return found


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    a, b = one - one.mean(), other - other.mean()
    length = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float((a * b).sum()) / length if length else 1.0
