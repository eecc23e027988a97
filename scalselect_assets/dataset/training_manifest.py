"""The manifest of a training dataset, and the test for a complete dataset."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator
from upath import UPath

from scalselect_assets.dataset.exports import publish
from scalselect_assets.declaration.selection import RETIRED_SETTINGS, Selection
from scalselect_assets.recording import data_versions
from scalselect_assets.resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore

NAME = "training_dataset"
MANIFEST = "manifest"
CODE_VERSION = "1"


def provenance(
    selection: Selection,
    subset_provenance: str,
    subset_version: str,
    basis_version: str,
    left_out: Sequence[str],
) -> str:
    """The hash of all inputs of the files; the basis version covers the vectors, and so the texts."""
    return data_versions.provenance(
        NAME,
        CODE_VERSION,
        settings=result_settings(selection),
        selected_subset=[subset_provenance, subset_version],
        subspace_basis=basis_version,
        left_out=list(left_out),
        **({"exports": publish.provenance(selection.exports)} if selection.exports else {}),
    )


def result_settings(selection: Selection) -> dict[str, Any]:
    """The selection's settings, without the key ``exports`` if none are declared, like older versions."""
    settings = {**selection.result_settings(), **RETIRED_SETTINGS}
    return settings if selection.exports else {key: settings[key] for key in settings if key != "exports"}


def read_manifest(artifacts: ArtifactStore) -> dict[str, Any]:
    """The manifest of the last training dataset.

    Raises:
        ArtifactMissingError: There is no manifest yet.
        ArtifactCorruptError: The manifest is damaged.
    """
    manifest: dict[str, Any] = artifacts.read_json(NAME, MANIFEST, shape=_Manifest)
    return manifest


def _whole(manifest: dict[str, Any]) -> dict[str, Any]:
    versions = {"data_version", "provenance", "basis_version", "shards", "training_file", "files"}
    counts = {"rows", "embedded", "rejected", "selected", "rank", "energy", "basis_drift"}
    if missing := (versions | counts) - set(manifest):
        raise ValueError(f"the manifest lacks {', '.join(sorted(missing))}")
    if manifest["training_file"] not in manifest["files"]:
        raise ValueError(f"the manifest does not describe its {manifest['training_file']}")
    return manifest


_Manifest: TypeAlias = Annotated[dict[str, Any], AfterValidator(_whole)]


def is_complete(artifacts: ArtifactStore, sha256: Callable[[UPath], str | None] | None = None) -> bool:
    """Whether the manifest exists and describes the training file and the exports' files correctly.

    Images that exports copied or linked are not checked.

    Args:
        artifacts: The store.
        sha256: Returns the hash of a file, or None if only its size is to be compared.
    """
    try:
        manifest = read_manifest(artifacts)
        for name, file in manifest["files"].items():
            if name == manifest["training_file"] or name.startswith(f"{publish.FOLDER}/"):
                path = artifacts.root / NAME / name
                if path.stat().st_size != file["bytes"]:
                    return False
                found = sha256(path) if sha256 else None
                if found is not None and found != file["sha256"]:
                    return False
    except (ArtifactMissingError, ArtifactCorruptError, FileNotFoundError):
        return False
    return True
