"""Images that were there earlier and are missing now; their rows keep their vectors.

A disk that is not mounted looks like a pool whose images were all deleted. So a row that had a vector keeps
it while its image is missing, until a person agrees that the image is gone. If more than a given share of the
images is missing at once, the refresh stops before anything is computed. Costs: for each shard with missing
images, its rows of the last refresh are read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from scalselect_assets.method.representation.rejection import RejectionReason
from scalselect_assets.resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore

KEPT = "rows_without_image"
"""The key, in the header of a shard's rows, of the number of rows that keep vectors without an image."""


@dataclass(frozen=True, slots=True)
class NewlyMissing:
    """Images that existed when their rows were last read and that are missing now.

    Attributes:
        n_images: Number of newly missing images, counted per shard.
        n_named: Number of images that the pool names, counted per shard.
        shards: Number of newly missing images of each shard that has any.
        example: One of the newly missing images.
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
    """Count the missing images that existed when their rows were last read.

    Args:
        artifacts: The store.
        rows_asset: The asset that holds the rows of each shard as they were read last.
        missing: The missing images of each shard.
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
    """The rows of a shard; a row whose only fault is a missing image is kept as it was before.

    Args:
        earlier: The shard's rows of the last refresh, if there are any.
        now: The shard's present rows.

    Returns:
        The rows, and the number of rows that were kept.
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
    """The number of rows of each shard, if any, that keep their vectors while their images are missing."""
    kept = {}
    for shard in shards:
        try:
            kept[shard] = int(artifacts.read_header(rows_asset, shard).get(KEPT, "0"))
        except (ArtifactMissingError, ArtifactCorruptError):
            continue  # the shard is read anew
    return {shard: count for shard, count in kept.items() if count}


def _images_of_accepted_rows(artifacts: ArtifactStore, rows_asset: str, shard: str) -> set[str]:
    try:
        rows, _ = artifacts.read_frame(rows_asset, shard, columns=["images", "reason"])
    except (ArtifactMissingError, ArtifactCorruptError):
        return set()
    accepted = rows.filter(pl.col("reason").is_null())["images"].explode().drop_nulls()
    return set(accepted.to_list())
