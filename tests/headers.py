"""Headers of a basis as a store holds them, for tests that write one by hand."""

from collections.abc import Iterable, Mapping

from scalselect_assets.subspace.basis_header import BasisHeader, MomentsHeader


def moments_header(vectors_version: str, *, rows: int = 0, version: str = "moments-1") -> MomentsHeader:
    """The header of a shard's moments of some version of its vectors."""
    return MomentsHeader(
        data_version=version,
        provenance="of-moments",
        attention_embeddings=vectors_version,
        model_fingerprint="fingerprint",
        rows=rows,
        lance_table="table",
        lance_version=1,
    )


def basis_header(
    version: str,
    shards: Mapping[str, MomentsHeader] | Iterable[str] = (),
    *,
    model: str = "fingerprint",
    unit_rows: bool = False,
    drift: Mapping[str, float] | None = None,
) -> BasisHeader:
    """The header of a basis of some shards."""
    if not isinstance(shards, Mapping):
        shards = {shard: moments_header("vectors-1") for shard in shards}
    return BasisHeader.model_construct(
        data_version=version,
        provenance="of-basis",
        model_fingerprint=model,
        rank_rule={"rule": "energy", "threshold": 0.9},
        standardise=False,
        unit_rows=unit_rows,
        shards=dict(shards),
        drift=dict(drift or {}),
    )
