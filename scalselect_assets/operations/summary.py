"""A summary of the last result: a few numbers, and the places of its files."""

from typing import Any

from scalselect_assets.choice import advice, comparison, selected_subset
from scalselect_assets.dataset import training_manifest
from scalselect_assets.dataset.exports import publish
from scalselect_assets.report import page_receipt
from scalselect_assets.resources.artifacts import (
    FRAME,
    RECORD,
    ArtifactCorruptError,
    ArtifactMissingError,
    ArtifactStore,
)


def summary(artifacts: ArtifactStore) -> dict[str, Any]:
    """The numbers of the last result in its manifest, and the places of its files.

    Raises:
        ArtifactMissingError: There is no result yet.
    """
    manifest = training_manifest.read_manifest(artifacts)
    folder = artifacts.root / training_manifest.NAME
    return {
        **{name: manifest[name] for name in ("rows", "embedded", "rejected", "rank", "energy", "selected")},
        "basis_drift": manifest["basis_drift"],
        **_advice(artifacts),
        "passed_over": manifest.get("passed_over", {}),
        "unknown_listed": manifest.get("unknown_listed", []),
        "selected_subset": str(artifacts.path(selected_subset.NAME, suffix=FRAME)),
        "training_dataset": str(folder / manifest["training_file"]),
        "manifest": str(artifacts.path(training_manifest.NAME, training_manifest.MANIFEST, suffix=RECORD)),
        **{f"export_{name}": str(folder / publish.FOLDER / name) for name in manifest.get("exports", {})},
        **({"report": str(page_receipt.page_path(artifacts))} if page_receipt.is_complete(artifacts) else {}),
    }


def _advice(artifacts: ArtifactStore) -> dict[str, Any]:
    """The finding on repetition in the choice and the advice; empty if no comparison with random exists."""
    try:
        compared, _ = artifacts.read_frame(comparison.NAME)
    except (ArtifactMissingError, ArtifactCorruptError):  # the next refresh makes it again
        return {}
    found = advice.repetition(compared)
    return {} if found is None else found.metadata()
