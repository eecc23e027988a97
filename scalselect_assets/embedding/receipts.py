"""The receipt that commits a shard's vectors, and the rows that have none."""

import dagster as dg
import polars as pl
from pydantic import BaseModel, field_validator

from scalselect_assets.recording import data_versions
from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.resources.embedding_store import EmbeddingTable

NAME = "attention_embeddings"
REJECTED = "rejected_rows"

CODE_VERSION = "1"


def provenance(fingerprint: str, max_image_pixels: int, raw_version: str) -> str:
    """The hash of all inputs of one shard's vectors. The fingerprint covers τ and the model."""
    return data_versions.provenance(
        NAME,
        CODE_VERSION,
        fingerprint=fingerprint,
        max_image_pixels=max_image_pixels,
        raw_samples=raw_version,
    )


class Receipt(BaseModel):
    """The record that names a shard's current table. It is written last and so commits the embedding.

    Attributes:
        table: The committed table.
        header: The header of the asset, in the form that artifacts store.
    """

    table: EmbeddingTable
    header: dict[str, str]

    @field_validator("header")
    @classmethod
    def _is_whole(cls, header: dict[str, str]) -> dict[str, str]:
        if missing := {"data_version", "provenance", "raw_samples", "raw_rows", "container"} - set(header):
            raise ValueError(f"the header lacks {', '.join(sorted(missing))}")
        return header


def recorded_table(artifacts: ArtifactStore, shard: str) -> tuple[EmbeddingTable, dict[str, str]]:
    """The committed table of a shard and the header that was recorded with it.

    Raises:
        ArtifactMissingError: The shard is not embedded.
        ArtifactCorruptError: The receipt is damaged.
    """
    receipt: Receipt = artifacts.read_json(NAME, shard, shape=Receipt)
    return receipt.table, receipt.header


def fitted_table(
    artifacts: ArtifactStore, shard: str, fitted_on: str | None
) -> tuple[EmbeddingTable, dict[str, str]]:
    """The committed table and header of a shard, if the basis was fitted on the vectors in it.

    Args:
        artifacts: The store.
        shard: The name of the shard.
        fitted_on: The version of the vectors that the basis was fitted on; None if the basis lacks the shard.

    Raises:
        ArtifactMissingError: The shard is not embedded.
        ArtifactCorruptError: The receipt is damaged.
        dg.Failure: The basis was fitted on other vectors of the shard, or without it.
    """
    table, header = recorded_table(artifacts, shard)
    if header["data_version"] != fitted_on:
        raise dg.Failure(
            f"the basis was fitted on version {fitted_on} of shard {shard!r}, its vectors are now "
            f"{header['data_version']}; run the refresh again, or materialize embedding_moments[{shard}] and "
            "subspace_basis first",
            allow_retries=False,
        )
    return table, header


def read_rejected(
    artifacts: ArtifactStore, shard: str, version: str, columns: list[str] | None = None
) -> pl.DataFrame:
    """The rows of a shard that have no vector, of the same version as its vectors.

    Raises:
        ArtifactMissingError: The shard is not embedded.
        ArtifactCorruptError: The file is damaged.
        dg.Failure: The rows belong to another version of the vectors than ``version``.
    """
    rejected, header = artifacts.read_frame(REJECTED, shard, columns=columns)
    if header["data_version"] != version:
        raise dg.Failure(
            f"{REJECTED}[{shard}] is of version {header['data_version']}, its vectors of {version}; "
            f"materialize {NAME}[{shard}] again",
            allow_retries=False,
        )
    return rejected
