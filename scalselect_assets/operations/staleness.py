"""Which assets of which shards are out of date."""

from collections.abc import Mapping
from typing import TypeAlias

from scalselect_assets.embedding import receipts
from scalselect_assets.pool import raw_samples
from scalselect_assets.subspace import embedding_moments

SHARD_ASSETS = (raw_samples.NAME, receipts.NAME, embedding_moments.NAME)


Headers: TypeAlias = Mapping[str, Mapping[str, str]]  # by shard, what its output says of itself


def is_current(header: Mapping[str, str], found: Mapping[str, str], expected: str) -> bool:
    """Whether what is stored, and what Dagster recorded of it, are what would be computed now.

    Both are asked: a store may be driven through several Dagster instances, and a process may be killed
    between writing a file and recording it.
    """
    return header.get("provenance") == found.get("provenance") == expected and header.get(
        "data_version"
    ) == found.get("data_version")
