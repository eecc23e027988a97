"""The two versions of every materialization, which make staleness a comparison.

The *data version* identifies the content. The *provenance* hashes the asset's code version, the settings that
matter to it and the data versions that it read. An asset is stale if the provenance that it would have now
differs from the one that Dagster recorded, or from the one in the file itself. A changed input whose output
comes out the same therefore makes nothing after that output stale. Both versions are recorded in the
materialization's metadata, since a run over many shards has metadata for each shard but one data version for
all. Dagster's own staleness does not decide: it skips fan-ins of 100 partitions or more, and it ignores
deleted partitions.
"""

from typing import Any

import dagster as dg

from scalselect_assets.resources.identity import digest

DATA_VERSION_TAG = "dagster/data_version"  # Dagster's own
_DATA_VERSION = "scalselect/data_version"
_PROVENANCE = "scalselect/provenance"


def header(data_version: str, provenance: str, **more: str) -> dict[str, str]:
    """The header that an artifact stores inside its file."""
    return {"data_version": data_version, "provenance": provenance, **more}


def recorded_versions(data_version: str, provenance: str) -> dict[str, str]:
    """Both versions as metadata of a materialization."""
    return {_DATA_VERSION: data_version, _PROVENANCE: provenance}


def recorded(materialization: dg.AssetMaterialization | None) -> dict[str, str]:
    """Both versions that ``recorded_versions`` wrote, named as in a file's header, or an empty dict."""
    metadata = materialization.metadata if materialization else {}
    names = {"data_version": _DATA_VERSION, "provenance": _PROVENANCE}
    return {name: str(metadata[key].value) for name, key in names.items() if key in metadata}


def provenance(asset: str, code_version: str, **inputs: Any) -> str:
    """The hash of everything that determines ``asset``: its code, its settings and the versions it reads."""
    return digest(asset, code_version, inputs)


def shown_code_version(code_version: str, **settings: Any) -> str:
    """The code version that Dagster shows and compares: the code's own, with a hash of the settings."""
    return f"{code_version}-{digest(settings)[:8]}"
