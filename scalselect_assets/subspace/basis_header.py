"""Typed headers of moments and basis: which version of which shard went in, and under which settings."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Json, TypeAdapter, ValidationError

from scalselect_assets.resources.artifacts import ARRAYS, ArtifactCorruptError, ArtifactStore

BASIS = "subspace_basis"


class MomentsHeader(BaseModel):
    """The header of the moments of one shard.

    Attributes:
        data_version: The version of the moments.
        provenance: The hash of the inputs of the moments.
        attention_embeddings: The version of the vectors that they sum up.
        model_fingerprint: The fingerprint of the model that made the vectors.
        rows: The number of vectors.
        lance_table: The LanceDB table that holds the vectors.
        lance_version: The version of that table.
    """

    model_config = ConfigDict(frozen=True)

    data_version: str
    provenance: str
    attention_embeddings: str
    model_fingerprint: str
    rows: int
    lance_table: str
    lance_version: int

    def to_header(self) -> dict[str, str]:
        """The header as artifacts carry it, of strings alone."""
        return {name: str(value) for name, value in self.model_dump().items()}


class BasisHeader(BaseModel):
    """The header of a basis.

    Attributes:
        data_version: The version of the basis.
        provenance: The hash of the inputs of the basis.
        model_fingerprint: The fingerprint of the model that made all vectors.
        rank_rule: The rule that chose the number of directions, as `RankRule.describe` gives it.
        standardise: Whether columns were divided by their standard deviation.
        unit_rows: Whether vectors were scaled to length 1.
        shards: The moments that went in, by shard.
        drift: The distance between the basis and the one before it, computed by `drift_since_last`.
    """

    model_config = ConfigDict(frozen=True)

    data_version: str
    provenance: str
    model_fingerprint: str
    rank_rule: Json[dict[str, Any]]
    standardise: Json[bool]
    unit_rows: Json[bool]
    shards: Json[dict[str, MomentsHeader]]
    drift: Json[dict[str, float]]

    def vectors_of(self, shard: str) -> str | None:
        """The version of a shard's vectors in the basis; None if the basis was fitted without the shard."""
        moments = self.shards.get(shard)
        return None if moments is None else moments.attention_embeddings

    def to_header(self) -> dict[str, str]:
        """The header as artifacts carry it, of strings alone."""
        return {
            "data_version": self.data_version,
            "provenance": self.provenance,
            "model_fingerprint": self.model_fingerprint,
            **{
                name: TypeAdapter(Any).dump_json(value).decode()
                for name, value in (
                    ("rank_rule", self.rank_rule),
                    ("standardise", self.standardise),
                    ("unit_rows", self.unit_rows),
                    ("shards", {shard: self.shards[shard].to_header() for shard in sorted(self.shards)}),
                    ("drift", self.drift),
                )
            },
        }


def moments_header(header: Mapping[str, str]) -> MomentsHeader:
    """The typed header of moments.

    Raises:
        pydantic.ValidationError: A field is missing or of another type; this is a ``ValueError``.
    """
    return MomentsHeader.model_validate(header)


def parse_basis_header(artifacts: ArtifactStore, header: Mapping[str, str]) -> BasisHeader:
    """The typed header of the store's basis.

    Raises:
        ArtifactCorruptError: A field is missing or of another type.
    """
    try:
        return BasisHeader.model_validate(header)
    except ValidationError as error:
        path = artifacts.path(BASIS, suffix=ARRAYS)
        raise ArtifactCorruptError(
            f"the header of {path} is not that of a basis ({error.error_count()} fields are wrong, "
            f"{error.errors()[0]['loc'][0]} for one); run again with --rebuild-basis",
            path,
        ) from error


def read_basis_header(artifacts: ArtifactStore) -> BasisHeader:
    """The header of the store's basis, without its arrays.

    Raises:
        ArtifactMissingError: There is no basis yet.
        ArtifactCorruptError: It is damaged.
    """
    return parse_basis_header(artifacts, artifacts.read_header(BASIS, suffix=ARRAYS))
