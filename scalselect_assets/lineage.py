"""What a materialization was computed from, as one hash, so that staleness is a comparison.

Every materialization carries two versions. Its *data version* (Dagster's own) says what came out; its
*provenance* (a tag) hashes the asset's code version, the settings that matter to it and the data versions
that it read. An asset is stale where the provenance that it would have now differs from the one that Dagster
recorded, or from the one in the file itself, so a changed input that leaves an output as it was stops there.
Dagster's own staleness is not used for the decision: it skips fan-ins of 100 partitions or more and ignores
deleted ones.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from resources.identity import digest

DATA_VERSION_TAG = "dagster/data_version"  # Dagster's own, on materializations and observations
PROVENANCE_TAG = "scalselect/provenance"


def header(data_version: str, provenance: str, **more: str) -> dict[str, str]:
    """What an artifact says of itself, stored inside its file."""
    return {"data_version": data_version, "provenance": provenance, **more}


def result(
    data_version: str,
    provenance: str,
    metadata: Mapping[str, Any],
    check_results: list[dg.AssetCheckResult] | None = None,
) -> dg.MaterializeResult:
    """A materialization that carries its data version and its provenance."""
    return dg.MaterializeResult(
        data_version=dg.DataVersion(data_version),
        tags={PROVENANCE_TAG: provenance},
        metadata=metadata,
        check_results=check_results or [],
    )


def provenance(asset: str, code_version: str, **inputs: Any) -> str:
    """The hash of all that determines ``asset``: its code, its settings and the versions that it reads."""
    return digest(asset, code_version, inputs)
