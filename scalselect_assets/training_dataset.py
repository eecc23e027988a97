"""Step 7, all shards: the chosen rows as a trainer reads them, with a manifest of where they come from.

Holds: one JSON or JSON Lines file, in pool order, each row's text as it stood in its shard, and
`manifest.json`. Costs: one pass over the raw rows of the shards, one shard in memory.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version as package_version
from typing import Any

import dagster as dg
import polars as pl
from upath import UPath

from resources.artifacts import ArtifactMissingError, ArtifactStore
from resources.sample_source import SampleSource
from resources.storage import StorageResource
from resources.vlm import VlmResource
from scalselect_assets import (
    attention_embeddings,
    embedding_moments,
    importance_scores,
    lineage,
    raw_samples,
    selected_subset,
    subspace_basis,
)
from scalselect_assets.method.rejection import RejectionReason
from scalselect_assets.selection import Selection
from scalselect_assets.tables import TRAINING_ROWS, column_schema

NAME = "training_dataset"
MANIFEST = "manifest"
CODE_VERSION = "1"


def provenance(selection: Selection, subset_version: str, raw_versions: Mapping[str, str]) -> str:
    """What the files are computed from."""
    return lineage.provenance(
        NAME,
        CODE_VERSION,
        text_only=selection.text_only,
        selected_subset=subset_version,
        raw_samples=dict(raw_versions),
    )


def read_manifest(artifacts: ArtifactStore) -> dict[str, Any]:
    """The manifest of the last training dataset.

    Raises:
        ArtifactMissingError: There is none yet.
    """
    manifest: dict[str, Any] = artifacts.read_json(NAME, MANIFEST)
    return manifest


def is_complete(artifacts: ArtifactStore) -> bool:
    """Whether the manifest and the training file that it names are there."""
    try:
        return bool((artifacts.root / NAME / read_manifest(artifacts)["training_file"]).exists())
    except ArtifactMissingError:
        return False


def build(selection: Selection) -> dg.AssetsDefinition:
    """The asset for one selection."""

    @dg.asset(
        **selection.asset_options(NAME, by_shard=False),
        deps=[selection.key(selected_subset.NAME), selection.key(raw_samples.NAME)],
        kinds={"json"},
        code_version=CODE_VERSION,
        metadata={"dagster/column_schema": column_schema(TRAINING_ROWS)},
        check_specs=[
            dg.AssetCheckSpec(
                "every_selected_row_is_written",
                asset=selection.key(NAME),
                description="The file holds each selected row once, and the text-only rows if they are kept.",
            )
        ],
    )
    def training_dataset(storage: StorageResource, vlm: VlmResource) -> dg.MaterializeResult:
        """The selected rows in the pool's own format, with a manifest that leads back to every input."""
        start = time.monotonic()
        artifacts = storage.artifacts(selection.store)
        source = storage.samples(selection.source, selection.image_root, selection.store)
        subset, subset_header = artifacts.read_frame(selected_subset.NAME)
        _, basis = subspace_basis.read_basis(artifacts)
        shards = sorted(json.loads(basis["shards"]))
        writer = _DatasetWriter(artifacts, source, shards, keep_text_only=selection.text_only == "keep")
        path, n_bytes = writer.write(subset)
        made_from = provenance(selection, subset_header["data_version"], writer.raw_versions)
        manifest = _manifest(selection, artifacts, vlm, source, writer, subset, path)
        manifest_path, _ = artifacts.write_json(NAME, manifest, MANIFEST)
        return lineage.result(
            writer.sha256,
            made_from,
            {
                "dagster/row_count": writer.n_rows,
                "selected_rows": subset.height,
                "text_only_rows": writer.n_text_only,
                "seconds": time.monotonic() - start,
                "bytes": n_bytes,
                "dagster/uri": str(path),
                "manifest": dg.MetadataValue.path(str(manifest_path)),
                "sha256": writer.sha256,
            },
            [
                dg.AssetCheckResult(
                    check_name="every_selected_row_is_written",
                    passed=writer.n_rows == subset.height + writer.n_text_only,
                    metadata={"written": writer.n_rows, "selected": subset.height},
                )
            ],
        )

    return training_dataset


class _DatasetWriter:
    """Streams the chosen rows of all shards into one file and keeps count."""

    def __init__(
        self, artifacts: ArtifactStore, source: SampleSource, shards: list[str], *, keep_text_only: bool
    ) -> None:
        self._artifacts, self._source, self._shards = artifacts, source, shards
        self._keep_text_only = keep_text_only
        self._digest = hashlib.sha256()
        self.raw_versions: dict[str, str] = {}
        self.row_formats: dict[str, int] = {}
        self.n_raw_rows = self.n_rows = self.n_text_only = 0

    @property
    def sha256(self) -> str:
        """Of what was written so far."""
        return self._digest.hexdigest()

    def write(self, subset: pl.DataFrame) -> tuple[UPath, int]:
        """Replace the file: a JSON array, or JSON Lines if all shards are; path and size in bytes."""
        lines = all(self._header(shard)["container"] == "lines" for shard in self._shards)
        path, other = (
            self._artifacts.path(NAME, "train", suffix=suffix)
            for suffix in ((".jsonl", ".json") if lines else (".json", ".jsonl"))
        )
        pieces = self._lines(subset) if lines else self._array(subset)
        size = self._artifacts.write_text(path, self._hashed(pieces))
        other.unlink(missing_ok=True)  # of an earlier pool in the other format
        return path, size

    def _header(self, shard: str) -> dict[str, str]:
        return self._artifacts.read_header(raw_samples.NAME, shard)

    def _lines(self, subset: pl.DataFrame) -> Iterator[str]:
        return (f"{text}\n" for text in self._texts(subset))

    def _array(self, subset: pl.DataFrame) -> Iterator[str]:
        separator = "[\n"
        for text in self._texts(subset):
            yield f"{separator}{text}"
            separator = ",\n"
        yield "\n]\n"

    def _hashed(self, pieces: Iterator[str]) -> Iterator[str]:
        for piece in pieces:
            self._digest.update(piece.encode())
            yield piece

    def _texts(self, subset: pl.DataFrame) -> Iterator[str]:
        """The chosen rows' texts in pool order."""
        chosen = {str(shard): rows["row"] for (shard,), rows in subset.group_by("shard")}
        for shard in self._shards:
            raw, header = self._artifacts.read_frame(raw_samples.NAME, shard)
            self.raw_versions[shard] = header["data_version"]
            self.n_raw_rows += raw.height
            is_text_only = pl.col("reason").eq(RejectionReason.TEXT_ONLY.value).fill_null(value=False)
            keep = pl.col("row").is_in(chosen.get(shard, pl.Series(dtype=pl.Int64())).to_list())
            if self._keep_text_only:
                self.n_text_only += raw.filter(is_text_only).height
                keep |= is_text_only
            for text, row_format, images in (
                raw.filter(keep).select("text", "row_format", "images").iter_rows()
            ):
                self.n_rows += 1
                name = row_format or "text_only"
                self.row_formats[name] = self.row_formats.get(name, 0) + 1
                yield self._source.export_text(shard, text, images)


def _manifest(
    selection: Selection,
    artifacts: ArtifactStore,
    vlm: VlmResource,
    source: SampleSource,
    writer: _DatasetWriter,
    subset: pl.DataFrame,
    path: UPath,
) -> dict[str, Any]:
    """Everything needed to say what the files are and to make them again."""
    subspace, basis = subspace_basis.read_basis(artifacts)
    inputs = json.loads(basis["shards"])
    subset_path = artifacts.path(selected_subset.NAME, suffix=".parquet")
    rejected = {shard: artifacts.read_frame(attention_embeddings.REJECTED, shard)[0] for shard in inputs}
    by_reason = raw_samples.reason_counts(pl.concat(rejected.values()))
    return {
        "selection": selection.name,
        "rows": writer.n_raw_rows,
        "embedded": subspace.n,
        "rejected": by_reason,
        "selected": subset.height,
        "text_only_kept": writer.n_text_only,
        "written": writer.n_rows,
        "row_formats": writer.row_formats,
        "budget": selection.budget,
        "attention_mass": selection.attention_mass,
        "energy_threshold": selection.energy,
        "rank": subspace.k,
        "energy": subspace.energy,
        "leverage_threshold": float(subset["leverage"][-1]),
        "model": vlm.card(artifacts, **selection.target),
        "code": {
            "scalselect-dagster": package_version("scalselect-dagster"),
            raw_samples.NAME: raw_samples.CODE_VERSION,
            attention_embeddings.NAME: attention_embeddings.CODE_VERSION,
            embedding_moments.NAME: embedding_moments.CODE_VERSION,
            subspace_basis.NAME: subspace_basis.CODE_VERSION,
            importance_scores.NAME: importance_scores.CODE_VERSION,
            selected_subset.NAME: selected_subset.CODE_VERSION,
            NAME: CODE_VERSION,
        },
        "basis_version": basis["data_version"],
        "shards": {
            shard: {
                "raw_samples": writer.raw_versions[shard],
                "attention_embeddings": versions["attention_embeddings"],
                "embedding_moments": versions["data_version"],
                "lance_table": versions["lance_table"],
                "lance_version": int(versions["lance_version"]),
                "rejected": rejected[shard].height,
            }
            for shard, versions in inputs.items()
        },
        "source": selection.source,
        "images_relative_to": str(source.images_folder()),
        "training_file": path.name,
        "files": {
            path.name: {"sha256": writer.sha256, "rows": writer.n_rows},
            f"../{selected_subset.NAME}/{subset_path.name}": {
                "sha256": hashlib.sha256(subset_path.read_bytes()).hexdigest(),
                "rows": subset.height,
            },
        },
    }
