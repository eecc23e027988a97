"""Images that were there earlier and are missing now; their rows keep their vectors.

A disk that is not mounted looks like a pool whose images were all deleted. So a row that had a vector keeps
it while its image is missing, until a person agrees that the image is gone; and where more than a share of
the images is missing at once, the refresh stops before anything is computed. Costs: for each shard that
misses images, reading its rows of the last time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from scalselect_assets.method.representation.rejection import RejectionReason
from scalselect_assets.resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore

KEPT = "rows_without_image"
"""In the header of a shard's rows: how many of them keep their vectors though their images are missing."""


@dataclass(frozen=True, slots=True)
class NewlyMissing:
    """Images that rows had when they were last read, and that are not there now.

    Attributes:
        n_images: Number of these images, counted in each shard that names them.
        n_named: Number of images that the pool names, counted in the same way.
        shards: The shards that miss some, by how many.
        example: One of them.
    """

    n_images: int
    n_named: int
    shards: Mapping[str, int]
    example: str

    @property
    def share(self) -> float:
        """The share of the named images that is newly missing."""
        return self.n_images / max(1, self.n_named)


def newly_missing(
    artifacts: ArtifactStore, rows_asset: str, missing: Mapping[str, Sequence[str]], n_named: int
) -> NewlyMissing:
    """Count the images that rows had before.

    Args:
        artifacts: The store.
        rows_asset: The asset that holds the rows of each shard as they were read last.
        missing: The images that each shard names and that are not there.
        n_named: Number of images that the pool names.
    """
    shards, example = {}, ""
    for shard, images in missing.items():
        found = _images_of_accepted_rows(artifacts, rows_asset, shard) & set(images)
        if found:
            shards[shard] = len(found)
            example = example or f"{min(found)} of shard {shard}"
    return NewlyMissing(sum(shards.values()), n_named, shards, example)


def kept_rows(earlier: pl.DataFrame | None, now: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """The rows of a shard, in which rows that only miss an image stay as they were while it was there.

    Args:
        earlier: The shard's rows of the last time, if there are any.
        now: Its rows as they are.

    Returns:
        The rows, and how many of them were kept.
    """
    if earlier is None:
        return now, 0
    columns = ["row_format", "conversation", "images"]
    accepted = earlier.filter(pl.col("reason").is_null()).select("sample_key", *columns)
    misses = pl.col("reason") == RejectionReason.MISSING_IMAGE.value
    joined = now.join(accepted, on="sample_key", how="left", suffix="_earlier", maintain_order="left")
    kept = misses & pl.col("conversation_earlier").is_not_null()
    count = int(joined.select(kept.sum()).item())
    if not count:
        return now, 0
    restored = joined.with_columns(
        *(pl.when(kept).then(f"{name}_earlier").otherwise(name).alias(name) for name in columns),
        *(pl.when(kept).then(None).otherwise(name).alias(name) for name in ("reason", "detail")),
    )
    return restored.select(now.columns).cast(now.schema), count


def n_kept(artifacts: ArtifactStore, rows_asset: str, shards: Iterable[str]) -> dict[str, int]:
    """The number of rows, for each shard that has some, that keep vectors although images are missing."""
    kept = {}
    for shard in shards:
        try:
            kept[shard] = int(artifacts.read_header(rows_asset, shard).get(KEPT, "0"))
        except (ArtifactMissingError, ArtifactCorruptError):
            continue  # it is read anew
    return {shard: count for shard, count in kept.items() if count}


def _images_of_accepted_rows(artifacts: ArtifactStore, rows_asset: str, shard: str) -> set[str]:
    try:
        rows, _ = artifacts.read_frame(rows_asset, shard, columns=["images", "reason"])
    except (ArtifactMissingError, ArtifactCorruptError):
        return set()
    accepted = rows.filter(pl.col("reason").is_null())["images"].explode().drop_nulls()
    return set(accepted.to_list())
