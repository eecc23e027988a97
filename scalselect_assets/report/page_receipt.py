"""The receipt that commits a report, and when the report counts as complete."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator
from upath import UPath

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.recording import data_versions
from scalselect_assets.resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from scalselect_assets.resources.identity import digest

NAME = "selection_report"
PAGE = "report"
RECEIPT = "receipt"
CODE_VERSION = "1"


def provenance(selection: Selection, dataset: Mapping[str, Any]) -> str:
    """The hash of what the report is made from.

    Args:
        selection: The selection.
        dataset: The training dataset's manifest, or the versions in it: its provenance covers the settings,
            the selection and the basis, and with it the vectors, the rows and their images.
    """
    return data_versions.provenance(
        NAME,
        CODE_VERSION,
        training_dataset=[dataset.get("provenance", ""), dataset.get("data_version", "")],
        additions=labels_version(selection),
    )


def labels_version(selection: Selection) -> str:
    """The version of the labels by which the report counts rows."""
    return digest(selection.source_label)


def _whole(receipt: dict[str, Any]) -> dict[str, Any]:
    if missing := {"data_version", "provenance", "bytes"} - set(receipt):
        raise ValueError(f"the receipt lacks {', '.join(sorted(missing))}")
    return receipt


_Receipt: TypeAlias = Annotated[dict[str, Any], AfterValidator(_whole)]


def read_receipt(artifacts: ArtifactStore) -> dict[str, Any]:
    """The receipt of the last report: ``data_version``, ``provenance`` and its size in ``bytes``.

    Raises:
        ArtifactMissingError: There is no report yet.
        ArtifactCorruptError: The receipt is damaged.
    """
    receipt: dict[str, Any] = artifacts.read_json(NAME, RECEIPT, shape=_Receipt)
    return receipt


def is_complete(artifacts: ArtifactStore, sha256: Callable[[UPath], str | None] | None = None) -> bool:
    """Whether the receipt is there and the page is as it states.

    Args:
        artifacts: The store.
        sha256: Gives the hash of a file, where it is to be compared beside the size.
    """
    try:
        receipt = read_receipt(artifacts)
        size = page_path(artifacts).stat().st_size
    except (ArtifactMissingError, ArtifactCorruptError, FileNotFoundError):
        return False
    found = sha256(page_path(artifacts)) if sha256 else None
    return bool(size == receipt["bytes"] and found in {None, receipt["data_version"]})


def page_path(artifacts: ArtifactStore) -> UPath:
    """The place of the page, whether or not it exists."""
    return artifacts.path(NAME, PAGE, suffix=".html")
