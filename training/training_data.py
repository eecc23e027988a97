"""Reads and verifies the outputs of a selection: manifest, training file, subset.

A run that records the subset it trained on must have read exactly that subset. The manifest holds the SHA-256
of the training file and of the subset; files that do not match it are refused (a refresh is writing them, or
somebody edited one). The training file is held in memory twice, as bytes and as rows.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl
from upath import UPath

from scalselect_assets.resources import seal

MANIFEST = "manifest.json"
SUBSET = "selected_subset"


class TrainingDataError(RuntimeError):
    """An output of a selection is missing or does not match its manifest; the message names the remedy."""


@dataclass(frozen=True, slots=True)
class TrainingData:
    """One version of a selection's training dataset.

    Attributes:
        manifest: Content of `manifest.json`.
        subset_version: Dagster's data version of the `selected_subset` that the rows belong to.
        rows: The JSON text of every row of the training file, in its order.
    """

    manifest: Mapping[str, Any]
    subset_version: str
    rows: tuple[str, ...]

    @property
    def version(self) -> str:
        """Dagster's data version of the `training_dataset`: the SHA-256 of the training file."""
        return str(self.manifest["data_version"])

    @property
    def model(self) -> Mapping[str, Any]:
        """The target model: ``model`` (hub id or folder), ``revision``, ``commit``, ``fingerprint``, ..."""
        card: Mapping[str, Any] = self.manifest["model"]
        return card

    @property
    def training_file_sha256(self) -> str:
        """SHA-256 of the training file; `read_training_data` has verified it."""
        return str(self.manifest["files"][self.manifest["training_file"]]["sha256"])


def read_manifest(folder: UPath) -> dict[str, Any]:
    """The manifest in a `training_dataset` folder.

    Raises:
        TrainingDataError: The manifest is missing or not readable.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(data := path.read_bytes())
        seal.check(data, manifest)
    except FileNotFoundError as error:
        raise TrainingDataError(
            f"there is no {path}: materialize training_dataset first (`scalselect run` does)"
        ) from error
    except ValueError as error:
        raise TrainingDataError(
            f"{path} is not readable ({error}); materialize training_dataset again"
        ) from error
    return manifest


def read_training_data(folder: UPath) -> TrainingData:
    """Read and verify the `training_dataset` in ``folder`` and the `selected_subset` beside it.

    Raises:
        TrainingDataError: A file is missing, or the manifest describes another file.
    """
    manifest = read_manifest(folder)
    files: dict[str, dict[str, Any]] = manifest["files"]
    name = str(manifest["training_file"])
    data = _verified(folder / name, files[name])
    rows = _rows(data, lines=name.endswith(".jsonl"))
    if len(rows) != files[name]["rows"]:
        raise TrainingDataError(
            f"{folder / name} holds {len(rows)} rows, its manifest says {files[name]['rows']}"
        )
    subset_name = next(path for path in files if path.endswith(f"/{SUBSET}.parquet"))
    subset = _verified(folder.parent / subset_name.removeprefix("../"), files[subset_name])
    header = pl.read_parquet_metadata(io.BytesIO(subset))
    return TrainingData(manifest, header["data_version"], rows)


def _verified(path: UPath, described: Mapping[str, Any]) -> bytes:
    try:
        data = bytes(path.read_bytes())
    except FileNotFoundError as error:
        raise TrainingDataError(
            f"the manifest names {path}, which is not there; materialize training_dataset again"
        ) from error
    if (found := hashlib.sha256(data).hexdigest()) != described["sha256"]:
        raise TrainingDataError(
            f"{path} has SHA-256 {found}, its manifest says {described['sha256']}: one of them is of another "
            "version, and nothing is trained on it. Where a refresh is at work, wait for its end; else "
            "materialize selected_subset and training_dataset again"
        )
    return data


def _rows(data: bytes, *, lines: bool) -> tuple[str, ...]:
    if lines:
        # splitlines() would also split at a carriage return, which a row may contain.
        return tuple(line.decode() for line in data.split(b"\n") if line)
    return tuple(json.dumps(row, ensure_ascii=False) for row in json.loads(data))
