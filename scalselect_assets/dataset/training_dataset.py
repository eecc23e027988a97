"""Step 7, all shards: the chosen rows as a trainer reads them, with a manifest of where they come from.

Holds: one JSON or JSON Lines file, in pool order, each row's text as it stood in its shard when it was
embedded, and `manifest.json`; where the selection declares exports, a folder for each in `exports`, in the
trainers' own formats (`scalselect_assets.exports`). Costs: one pass over the texts of the shards, one shard's
in memory; exports add a temporary file of the chosen texts and what `exports.publish` says.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version as package_version
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import dagster as dg
import polars as pl
from pydantic import AfterValidator
from upath import UPath

from resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from resources.embedding_store import EmbeddingStore, EmbeddingTable
from resources.identity import digest
from resources.sample_source import SampleSource
from resources.storage import StorageResource
from resources.vlm import VlmResource
from scalselect_assets import (
    attention_embeddings,
    embedding_moments,
    importance_scores,
    lineage,
    raw_samples,
    removed_samples,
    selected_subset,
    subspace_basis,
)
from scalselect_assets.exports import publish
from scalselect_assets.exports.rows import ExportRow, RowSpool
from scalselect_assets.materialization import Output, at_work
from scalselect_assets.method.rejection import RejectionReason
from scalselect_assets.method.selection import budget_size
from scalselect_assets.partitions import pool_shards
from scalselect_assets.selection import RETIRED_SETTINGS, Selection
from scalselect_assets.tables import TRAINING_ROWS, column_schema

if TYPE_CHECKING:
    from scalselect_assets.method.subspace import Subspace

NAME = "training_dataset"
MANIFEST = "manifest"
_ROWS = pl.Schema({"row": pl.Int64(), "text": pl.String(), "images": pl.List(pl.String())})
# What exports tell of a row beside.
_EXPORT_ROWS = pl.Schema(
    {
        **_ROWS,
        "sample_key": pl.String(),
        "source_id": pl.String(),
        "image_sha256": pl.List(pl.String()),
        "rank": pl.Int64(),
        "leverage": pl.Float64(),
        "normalised_leverage": pl.Float64(),
        "n_tokens": pl.Int64(),
    }
)
CODE_VERSION = "1"
EXPORTS_CHECK = "exports_pass_their_preflight"


def provenance(
    selection: Selection,
    subset_provenance: str,
    subset_version: str,
    basis_version: str,
    left_out: Sequence[str],
) -> str:
    """What the files are computed from; the basis version covers the vectors, and with them the texts."""
    return lineage.provenance(
        NAME,
        CODE_VERSION,
        settings=_result_settings(selection),
        selected_subset=[subset_provenance, subset_version],
        subspace_basis=basis_version,
        left_out=list(left_out),
        **({"exports": publish.provenance(selection.exports)} if selection.exports else {}),
    )


def _result_settings(selection: Selection) -> dict[str, Any]:
    """The selection's settings; one that declares no exports is what it was before there were any."""
    settings = {**selection.result_settings(), **RETIRED_SETTINGS}
    return settings if selection.exports else {key: settings[key] for key in settings if key != "exports"}


def read_manifest(artifacts: ArtifactStore) -> dict[str, Any]:
    """The manifest of the last training dataset.

    Raises:
        ArtifactMissingError: There is none yet.
        ArtifactCorruptError: It is damaged.
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


def is_complete(artifacts: ArtifactStore) -> bool:
    """Whether the manifest is there, and the training file and those of the exports are of the stated size.

    Images that exports copied or linked are not looked at.
    """
    try:
        manifest = read_manifest(artifacts)
        for name, file in manifest["files"].items():
            if name == manifest["training_file"] or name.startswith(f"{publish.FOLDER}/"):
                size = (artifacts.root / NAME / name).stat().st_size
                if size != file["bytes"]:
                    return False
    except (ArtifactMissingError, ArtifactCorruptError, FileNotFoundError):
        return False
    return True


def build(selection: Selection) -> dg.AssetsDefinition:
    """The asset for one selection."""

    @dg.asset(
        **selection.asset_options(NAME, by_shard=False),
        deps=[
            selection.key(name)
            for name in (selected_subset.NAME, subspace_basis.NAME, attention_embeddings.NAME)
        ],
        kinds={"json"},
        code_version=lineage.shown_code_version(CODE_VERSION, settings=_result_settings(selection)),
        metadata={"dagster/column_schema": column_schema(TRAINING_ROWS)},
        check_specs=[
            dg.AssetCheckSpec(
                "every_selected_row_is_written",
                asset=selection.key(NAME),
                description="The file holds each selected row once, and the text-only rows if they are kept.",
            ),
            *_export_checks(selection),
        ],
    )
    def training_dataset(
        context: dg.AssetExecutionContext, storage: StorageResource, vlm: VlmResource
    ) -> dg.MaterializeResult:
        """The selected rows in the pool's own format, with a manifest that leads back to every input."""
        with at_work(context, storage.locks(selection.store)), ExitStack() as spools:
            start = time.monotonic()
            artifacts = storage.artifacts(selection.store)
            source = storage.samples(selection.source, selection.image_root, selection.store)
            subset, subset_header = artifacts.read_frame(selected_subset.NAME)
            subspace, basis = subspace_basis.read_basis(artifacts)
            inputs = json.loads(basis["shards"])
            spool = spools.enter_context(RowSpool()) if selection.exports else None
            writer = _DatasetWriter(
                artifacts,
                storage.embeddings(selection.store),
                source,
                sorted(inputs),
                text_only=_text_only_rows(artifacts, selection, sorted(inputs)),
                spool=spool,
            )
            path, n_bytes = writer.write(subset)
            exports = _write_exports(selection, artifacts, spool, source)
            data_version = _data_version(writer.sha256, exports)
            pool = pool_shards(context, selection.partitions)
            left_out = [shard for shard in pool if shard not in inputs]
            made_from = provenance(
                selection,
                subset_header["provenance"],
                subset_header["data_version"],
                basis["data_version"],
                left_out,
            )
            manifest = {
                **lineage.header(data_version, made_from),
                "shards_left_out": left_out,
                "model": vlm.card(artifacts, **selection.target),
                "basis_version": basis["data_version"],
                "basis_drift": json.loads(basis["drift"]),
                "images_relative_to": str(source.images_folder()),
                "training_file": path.name,
                **_settings(selection),
                **_counts(subspace, subset, writer),
                "shards": {
                    shard: _shard_lineage(writer, shard, moments, basis["data_version"])
                    for shard, moments in inputs.items()
                },
                "files": _files(artifacts, subset, writer, path, n_bytes),
            }
            if exports:
                manifest["exports"] = {name: report.to_json() for name, report in exports.items()}
                manifest["files"] |= publish.files(exports)
            manifest_path, _ = artifacts.write_json(NAME, manifest, MANIFEST)
            publish.remove_others(artifacts.root / NAME / publish.FOLDER, list(exports))
            return Output(
                data_version,
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
                    **publish.metadata(exports),
                },
                (
                    dg.AssetCheckResult(
                        check_name="every_selected_row_is_written",
                        passed=writer.n_selected == subset.height
                        and writer.n_rows == writer.n_selected + writer.n_text_only,
                        metadata={"written": writer.n_rows, "selected": subset.height},
                    ),
                    *_export_results(exports),
                ),
            ).result()

    return training_dataset


def _export_checks(selection: Selection) -> list[dg.AssetCheckSpec]:
    """The check that a selection with exports has beside."""
    if not selection.exports:
        return []
    return [
        dg.AssetCheckSpec(
            EXPORTS_CHECK,
            asset=selection.key(NAME),
            description="Each export, read by its trainer's rules, holds every row that it does not refuse.",
        )
    ]


def _export_results(exports: Mapping[str, publish.Report]) -> list[dg.AssetCheckResult]:
    if not exports:
        return []
    failed = publish.failed(exports)
    refused = {name: report.refused for name, report in exports.items() if report.refused}
    return [
        dg.AssetCheckResult(
            check_name=EXPORTS_CHECK,
            passed=not failed,
            severity=dg.AssetCheckSeverity.ERROR,
            metadata={
                "exports": list(exports),
                "failed": failed,
                "refused": refused,
                "written": {name: report.written for name, report in exports.items()},
            },
        )
    ]


def _write_exports(
    selection: Selection, artifacts: ArtifactStore, spool: RowSpool | None, source: SampleSource
) -> dict[str, publish.Report]:
    """The declared exports, each in its folder; none where none are declared.

    Raises:
        dg.Failure: One cannot be made as declared.
    """
    if spool is None:
        return {}
    folder = artifacts.root / NAME / publish.FOLDER
    try:
        return publish.write_exports(selection.exports, spool, source, folder, selection.name)
    except publish.ExportError as error:
        raise dg.Failure(str(error), allow_retries=False) from error


def _data_version(sha256: str, exports: Mapping[str, publish.Report]) -> str:
    """Of the training file alone where nothing else is made of it."""
    if not exports:
        return sha256
    return digest(sha256, {name: file["sha256"] for name, file in publish.files(exports).items()})


def _text_only_rows(
    artifacts: ArtifactStore, selection: Selection, shards: Sequence[str]
) -> dict[str, set[int]]:
    """The rows without an image that are kept, by shard: all, none, or a seeded draw within their budget.

    Each row's place in the draw is a hash of its key, so that most stay when the pool grows.

    Raises:
        dg.Failure: Their budget is more rows than there are.
    """
    if selection.text_only == "drop":
        return {}
    removed, _ = removed_samples.read_removed(artifacts, selection)
    frames = []
    for shard in shards:
        rejected, _ = artifacts.read_frame(
            attention_embeddings.REJECTED, shard, columns=["shard", "row", "sample_key", "reason"]
        )
        frames.append(rejected.filter(pl.col("reason") == RejectionReason.TEXT_ONLY.value))
    rows = pl.concat(frames).join(removed, on=["shard", "row"], how="anti")
    if selection.text_only != "keep" and (rows.height or isinstance(selection.text_only, int)):
        if isinstance(selection.text_only, int) and selection.text_only > rows.height:
            raise dg.Failure(
                f"text_only asks for {selection.text_only} rows without an image, there are {rows.height}; "
                "lower it, or write it as a fraction",
                allow_retries=False,
            )
        places = [
            hashlib.sha256(f"{selection.seed} {key}".encode()).hexdigest() for key in rows["sample_key"]
        ]
        rows = (
            rows.with_columns(place=pl.Series(places))
            .sort(["place", "shard"])
            .head(budget_size(selection.text_only, rows.height))
        )
    return {str(shard): set(part["row"]) for (shard,), part in rows.group_by("shard")}


class _DatasetWriter:
    """Streams the chosen rows of all shards into one file, and the exports' spool; keeps count."""

    def __init__(
        self,
        artifacts: ArtifactStore,
        embeddings: EmbeddingStore,
        source: SampleSource,
        shards: list[str],
        *,
        text_only: Mapping[str, set[int]],
        spool: RowSpool | None = None,
    ) -> None:
        self._artifacts, self._embeddings, self._source = artifacts, embeddings, source
        self.tables: dict[str, EmbeddingTable] = {}
        self.headers: dict[str, dict[str, str]] = {}
        for shard in shards:
            self.tables[shard], self.headers[shard] = attention_embeddings.recorded_table(artifacts, shard)
        self._text_only, self._spool = text_only, spool
        self._schema = _ROWS if spool is None else _EXPORT_ROWS
        self._digest = hashlib.sha256()
        self.rejected: dict[str, dict[str, int]] = {}
        self.row_formats: dict[str, int] = {}
        self.n_rows = self.n_selected = self.n_text_only = 0

    @property
    def sha256(self) -> str:
        """Of what was written so far."""
        return self._digest.hexdigest()

    def write(self, subset: pl.DataFrame) -> tuple[UPath, int]:
        """Replace the file: a JSON array, or JSON Lines if all shards are; path and size in bytes."""
        # A shard without rows has no say in the format.
        lines = all(
            header["container"] == "lines" for header in self.headers.values() if header["raw_rows"] != "0"
        )
        path, other = (
            self._artifacts.path(NAME, "train", suffix=suffix)
            for suffix in ((".jsonl", ".json") if lines else (".json", ".jsonl"))
        )
        pieces = self._lines(subset) if lines else self._array(subset)
        size = self._artifacts.write_text(path, self._hashed(pieces))
        other.unlink(missing_ok=True)  # of an earlier pool in the other format
        return path, size

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
        """The chosen rows' texts in pool order, as they were when they were embedded."""
        chosen = {str(shard): rows for (shard,), rows in subset.group_by("shard")}
        for shard in self.tables:
            rows = self._chosen_rows(shard, chosen[shard]) if shard in chosen else self._none()
            self.n_selected += rows.height
            text_only = self._text_only_rows(shard)
            self.n_text_only += text_only.height
            for row, text, images, *told in pl.concat([rows, text_only]).sort("row").iter_rows():
                self.n_rows += 1
                if self._spool is not None:
                    values = dict(zip(_EXPORT_ROWS.names()[len(_ROWS) :], told, strict=True))
                    self._spool.add(ExportRow(shard=shard, row=row, text=text, images=images, **values))
                row_format = "llava" if "conversations" in json.loads(text) else "sharegpt"
                self.row_formats[row_format] = self.row_formats.get(row_format, 0) + 1
                yield self._source.export_text(shard, text, images)

    def _chosen_rows(self, shard: str, chosen: pl.DataFrame) -> pl.DataFrame:
        """Rows of the shard's table by sample key.

        Raises:
            dg.Failure: The table is not the one that was scored: a chosen key is not in it.
        """
        table = self.tables[shard]
        columns = ["sample_key", "text", "images"]
        if self._spool is not None:
            columns += ["image_sha256", "n_tokens"]
        held = pl.DataFrame(self._embeddings.read_rows(table, columns))
        rows = held.join(chosen, on=["sample_key", "row"], how="inner")
        if rows.height != chosen.height:
            raise dg.Failure(
                f"{chosen.height - rows.height} selected samples of shard {shard!r} are not in its table "
                f"{table.table!r} version {table.version}; run the refresh again",
                allow_retries=False,
            )
        return rows.select(self._schema.names()).cast(self._schema)

    def _none(self) -> pl.DataFrame:
        return pl.DataFrame(schema=self._schema)

    def _text_only_rows(self, shard: str) -> pl.DataFrame:
        """The shard's rows without an image that are kept; counts all rejected rows."""
        version = self.headers[shard]["data_version"]
        rejected = attention_embeddings.read_rejected(self._artifacts, shard, version)
        self.rejected[shard] = raw_samples.reason_counts(rejected)
        kept = rejected.filter(pl.col("row").is_in(self._text_only.get(shard, set())))
        if self._spool is not None:
            for record in rejected.join(kept, on="row", how="anti").sort("row").iter_rows(named=True):
                self._spool.add_rejection(publish.pool_record(shard, record))
        told = {
            name: pl.lit([] if isinstance(dtype, pl.List) else None, dtype)
            for name, dtype in self._schema.items()
            if name not in kept.columns
        }
        return kept.with_columns(**told).select(self._schema.names()).cast(self._schema)


def _settings(selection: Selection) -> dict[str, Any]:
    """What was asked for, and the code that answered."""
    return {
        "selection": selection.name,
        "source": selection.source,
        **selection.choice_settings(),
        "attention_mass": selection.attention_mass,
        "rank_rule": selection.rank_rule.describe(),
        "preprocessing": {
            "centred": True,
            "standardise": selection.standardise,
            "unit_rows": selection.unit_rows,
        },
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
    }


def _counts(subspace: "Subspace", subset: pl.DataFrame, writer: _DatasetWriter) -> dict[str, Any]:
    """Where every row of the pool went, and what the choice rests on."""
    by_reason = Counter[str]()
    for counts in writer.rejected.values():
        by_reason.update(counts)
    return {
        "rows": sum(int(header["raw_rows"]) for header in writer.headers.values()),
        "embedded": subspace.n,
        "rejected": dict(sorted(by_reason.items())),
        "selected": subset.height,
        "text_only_kept": writer.n_text_only,
        "written": writer.n_rows,
        "row_formats": writer.row_formats,
        "rank": subspace.k,
        "energy": subspace.energy,
        "leverage_threshold": float(subset["leverage"][-1]),
    }


def _shard_lineage(
    writer: _DatasetWriter, shard: str, moments: Mapping[str, str], basis_version: str
) -> dict[str, Any]:
    """The versions that one shard went in with."""
    return {
        "raw_samples": writer.headers[shard]["raw_samples"],
        "attention_embeddings": moments["attention_embeddings"],
        "embedding_moments": moments["data_version"],
        "scored_with_basis": basis_version,
        "lance_table": writer.tables[shard].table,
        "lance_version": writer.tables[shard].version,
        "rejected": sum(writer.rejected[shard].values()),
    }


def _files(
    artifacts: ArtifactStore, subset: pl.DataFrame, writer: _DatasetWriter, path: UPath, n_bytes: int
) -> dict[str, Any]:
    """Hash, rows and size of each file, by its path from the manifest."""
    subset_path = artifacts.path(selected_subset.NAME, suffix=".parquet")
    subset_bytes = subset_path.read_bytes()
    return {
        path.name: {"sha256": writer.sha256, "rows": writer.n_rows, "bytes": n_bytes},
        f"../{selected_subset.NAME}/{subset_path.name}": {
            "sha256": hashlib.sha256(subset_bytes).hexdigest(),
            "rows": subset.height,
            "bytes": len(subset_bytes),
        },
    }
