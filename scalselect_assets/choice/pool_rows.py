"""The embedded rows of the pool as the choice sees them: scores, tokens, sources, and who is on a list.

Rows come in the order of their shards, then of their places in them. What is read of a shard is its scores
and, of its vectors' table, the columns that something asks for. Costs: some 300 bytes for every row that is
held; the texts of a shard are read only where a field of the row names the source.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dagster as dg
import numpy as np
import polars as pl

from scalselect_assets.choice.labels import label_of
from scalselect_assets.embedding import receipts
from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.resources.embedding_store import EmbeddingStore, EmbeddingTable
from scalselect_assets.subspace import importance_scores
from scalselect_assets.subspace.basis_header import BasisHeader

if TYPE_CHECKING:
    from scalselect_assets.method.choice.candidates import Candidates


_SCORES = ("row", "sample_key", "source_id", "leverage", "normalised_leverage")


@dataclass(frozen=True)
class PoolRows:
    """Reads the rows of the shards that are in the basis.

    Attributes:
        artifacts: The store.
        embeddings: Its vectors.
        basis: The header of the basis that the scores must be of.
        labels: The labels that rows are to have, each a column.
        with_images: Whether rows are to have the hashes of their images.
    """

    artifacts: ArtifactStore
    embeddings: EmbeddingStore
    basis: BasisHeader
    labels: Sequence[str]
    with_images: bool = False

    def scores(self, columns: list[str] | None = None) -> Iterator[tuple[str, pl.DataFrame]]:
        """The scores of each shard, in the order of their names.

        Raises:
            dg.Failure: A shard was scored with another basis.
        """
        for shard in sorted(self.basis.shards):
            yield (
                shard,
                importance_scores.read_scores(self.artifacts, self.basis.data_version, shard, columns),
            )

    def all(self) -> pl.DataFrame:
        """Every embedded row; see ``described``."""
        return pl.concat([self.described(shard, scores.select(_SCORES)) for shard, scores in self.scores()])

    def described(self, shard: str, scored: pl.DataFrame) -> pl.DataFrame:
        """Some rows of a shard with all that a choice may ask of them.

        Returns:
            Their columns, the shard, ``n_text_tokens`` and ``n_image_tokens`` (Int64), ``asks_before_image``
            (Boolean, null where it was not recorded), a String column for each label and, if asked for,
            ``image_sha256``.

        Raises:
            dg.Failure: The shard's table is not the one that was scored.
        """
        table = self.table(shard)
        wanted = ["sample_key", "n_tokens", "n_vision_tokens", "asks_before_image"]
        if self.with_images:
            wanted.append("image_sha256")
        if "image_folder" in self.labels:
            wanted.append("images")
        if any(label == "source" or label.startswith("field:") for label in self.labels):
            wanted.append("text")
        held = pl.DataFrame(self.embeddings.read_rows(table, wanted)).with_columns(
            asks_before_image=pl.col("asks_before_image").cast(pl.Boolean),
            n_image_tokens=pl.col("n_vision_tokens").cast(pl.Int64),
            n_text_tokens=(pl.col("n_tokens") - pl.col("n_vision_tokens")).cast(pl.Int64),
            **{label: label_of(label, shard) for label in self.labels},
        )
        kept = [
            "row",
            "sample_key",
            "n_text_tokens",
            "n_image_tokens",
            "asks_before_image",
            *self.labels,
            *(["image_sha256"] if self.with_images else []),
        ]
        rows = scored.join(held.select(kept), on=["row", "sample_key"], how="inner", maintain_order="left")
        if rows.height != scored.height:
            raise dg.Failure(
                f"{scored.height - rows.height} scored rows of shard {shard!r} are not in its table "
                f"{table.table!r} version {table.version}; run the refresh again",
                allow_retries=False,
            )
        return rows.with_columns(shard=pl.lit(shard))

    def table(self, shard: str) -> EmbeddingTable:
        """The table that the basis and the scores are of.

        Raises:
            dg.Failure: The shard has other vectors by now.
        """
        return receipts.fitted_table(self.artifacts, shard, self.basis.vectors_of(shard))[0]


def candidates(rows: pl.DataFrame, labels: Sequence[str]) -> "Candidates":
    """The rows as the method takes them, in their order."""
    from scalselect_assets.method.choice.candidates import Candidates, Labels, levelled

    # Samples of one key are copies in several shards, as long as their images are the same.
    copies = rows.select(pl.col("sample_key").rank("dense").cast(pl.Int64) - 1).to_series().to_numpy()
    order = np.empty(rows.height, np.int64)
    order[rows.select(pl.arg_sort_by("sample_key", "shard")).to_series().to_numpy()] = np.arange(rows.height)
    return Candidates(
        levelled(rows["normalised_leverage"].to_numpy(), copies),
        order,
        rows["n_text_tokens"].to_numpy(),
        rows["n_image_tokens"].to_numpy(),
        {label: Labels.of(rows[label].to_list()) for label in labels},
    )
