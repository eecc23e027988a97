"""Step 7, all shards: the chosen rows as files for a trainer, with a manifest that names all inputs.

The output is one JSON or JSON Lines file in pool order, with each row's text as it was in its shard at the
time of embedding, and `manifest.json`. If the selection declares exports, `exports` holds a folder for each,
in the trainers' own formats (`dataset.exports`). Costs: one pass over the texts of the shards, with one
shard's texts in memory; exports add a temporary file of the chosen texts and the costs that `exports.publish`
states.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version as package_version
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl
from upath import UPath

from scalselect_assets.asset_path import OutputHeader, PoolAsset, StoreState, path_of
from scalselect_assets.choice import selected_subset
from scalselect_assets.dataset.exports import publish
from scalselect_assets.dataset.exports.placed_images import ExportError
from scalselect_assets.dataset.exports.rows import RowSpool
from scalselect_assets.dataset.training_manifest import is_complete, read_manifest
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.recording import data_versions
from scalselect_assets.recording.checks import require_passed
from scalselect_assets.recording.columns import TRAINING_ROWS, column_schema
from scalselect_assets.recording.materialization import Output, at_work
from scalselect_assets.recording.records import Records
from scalselect_assets.resources.artifacts import FRAME, ArtifactStore
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.sample_source import SampleSource
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource
from scalselect_assets.subspace import subspace_basis
from scalselect_assets.subspace.basis_header import BasisHeader, parse_basis_header

if TYPE_CHECKING:
    from scalselect_assets.method.subspace.basis import Subspace

from scalselect_assets.dataset.training_manifest import (
    CODE_VERSION,
    MANIFEST,
    NAME,
    provenance,
    result_settings,
)
from scalselect_assets.dataset.writer import DatasetWriter, text_only_rows
from scalselect_assets.embedding import receipts

ROWS_CHECK = "every_selected_row_is_written"
EXPORTS_CHECK = "exports_pass_their_preflight"


def build(selection: Selection) -> dg.AssetsDefinition:
    """The asset for one selection."""

    @dg.asset(
        **selection.asset_options(NAME, by_shard=False),
        deps=[selection.key(name) for name in (selected_subset.NAME, subspace_basis.NAME, receipts.NAME)],
        kinds={"json"},
        code_version=data_versions.shown_code_version(CODE_VERSION, settings=result_settings(selection)),
        metadata={"dagster/column_schema": column_schema(TRAINING_ROWS)},
        check_specs=[
            dg.AssetCheckSpec(
                ROWS_CHECK,
                asset=selection.key(NAME),
                description="The file holds each selected row once, and the text-only rows if they are kept.",
            ),
            dg.AssetCheckSpec(
                "every_file_of_the_pool_is_read",
                asset=selection.key(NAME),
                description="No file in the pool's folder is passed over but images and ignored ones.",
            ),
            *_export_checks(selection),
        ],
    )
    def training_dataset(
        context: dg.AssetExecutionContext, storage: StorageResource, vlm: VlmResource
    ) -> dg.MaterializeResult:
        """The selected rows in the pool's own format, with a manifest that leads back to every input."""
        with at_work(context, storage.locks(selection.store)):
            shards = sorted(Records(context.instance).known_shards(selection.name))
            return write_dataset(selection, storage, vlm, shards).result()

    return training_dataset


def write_dataset(
    selection: Selection, storage: StorageResource, vlm: VlmResource, shards: Sequence[str]
) -> Output:
    """Write the training file, the exports and the manifest.

    Args:
        selection: The selection whose dataset is written.
        storage: Opens pool and store.
        vlm: Describes the target model.
        shards: All shards of the pool; the manifest names the shards that are not in the basis.

    Raises:
        dg.Failure: The files cannot be written as declared.
        FailedCheckError: Rows are missing in a file; the last files stay.
    """
    start = time.monotonic()
    artifacts = storage.artifacts(selection.store)
    source = selection.open_pool(storage)
    subset, subset_header = artifacts.read_frame(selected_subset.NAME)
    subspace, basis = subspace_basis.read_basis(artifacts)
    in_basis = sorted(basis.shards)
    with ExitStack() as spools:
        spool = spools.enter_context(RowSpool()) if selection.exports else None
        writer = DatasetWriter(
            artifacts,
            storage.embeddings(selection.store),
            source,
            in_basis,
            text_only=text_only_rows(artifacts, selection, in_basis),
            spool=spool,
        )
        exports: dict[str, publish.Report] = {}

        def finish() -> None:
            require_passed(_every_row_check(writer, subset))
            exports.update(_write_exports(selection, artifacts, spool, source))

        path, n_bytes = writer.write(subset, finish)
    left_out = [shard for shard in shards if shard not in basis.shards]
    passed_over = source.listing().to_json()
    data_version = _data_version(writer.sha256, exports)
    made_from = provenance(
        selection,
        subset_header["provenance"],
        subset_header["data_version"],
        basis.data_version,
        left_out,
    )
    manifest = {
        **data_versions.header(data_version, made_from),
        "shards_left_out": left_out,
        "model": vlm.card(artifacts, **selection.target),
        "basis_version": basis.data_version,
        "basis_drift": basis.drift,
        "images_relative_to": str(source.images_folder()),
        "embedded_images_relative_to": str(source.shards_folder()),
        "passed_over": passed_over,
        "unknown_listed": json.loads(subset_header.get("unknown_listed", "[]")),
        "training_file": path.name,
        **_settings(selection),
        **_counts(subspace, subset, writer),
        "shards": {shard: _shard_lineage(writer, shard, basis) for shard in basis.shards},
        "files": {**_files(artifacts, subset, writer, path, n_bytes), **publish.files(exports)},
        **({"exports": {name: report.to_json() for name, report in exports.items()}} if exports else {}),
    }
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
        (_every_row_check(writer, subset), _every_file_check(passed_over), *_export_results(exports)),
    )


def _every_row_check(writer: DatasetWriter, subset: pl.DataFrame) -> dg.AssetCheckResult:
    """Whether the file holds each selected row once, and nothing else but text-only rows."""
    return dg.AssetCheckResult(
        check_name=ROWS_CHECK,
        passed=writer.n_selected == subset.height and writer.n_rows == writer.n_selected + writer.n_text_only,
        metadata={"written": writer.n_rows, "selected": subset.height},
    )


def _every_file_check(passed_over: Mapping[str, Any]) -> dg.AssetCheckResult:
    """Whether no file in the pool's folder is passed over, except those that are ignored on request."""
    unexpected = {kind: found for kind, found in passed_over.items() if kind != "ignored"}
    return dg.AssetCheckResult(
        check_name="every_file_of_the_pool_is_read",
        passed=not unexpected,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"passed_over": unexpected},
    )


def _export_checks(selection: Selection) -> list[dg.AssetCheckSpec]:
    """The additional check of a selection with exports."""
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
    """Write the declared exports, each in its folder, and return their reports.

    Raises:
        dg.Failure: An export cannot be made as declared.
    """
    if spool is None:
        return {}
    folder = artifacts.root / NAME / publish.FOLDER
    try:
        return publish.write_exports(
            selection.exports,
            spool,
            source,
            folder,
            selection.name,
            lambda reports: require_passed(*_export_results(reports)),
        )
    except ExportError as error:
        raise dg.Failure(str(error), allow_retries=False) from error


def _data_version(sha256: str, exports: Mapping[str, publish.Report]) -> str:
    """The data version: a hash of all files, or that of the training file if there are no exports."""
    if not exports:
        return sha256
    return digest(sha256, {name: file["sha256"] for name, file in publish.files(exports).items()})


def _settings(selection: Selection) -> dict[str, Any]:
    """The settings of the selection and the versions of the code."""
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
            **{asset.name: asset.code_version for asset in path_of(selection)},
        },
    }


def _counts(subspace: "Subspace", subset: pl.DataFrame, writer: DatasetWriter) -> dict[str, Any]:
    """The counts of the pool's rows by outcome, and the rank, energy and threshold of the choice."""
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


def _shard_lineage(writer: DatasetWriter, shard: str, basis: BasisHeader) -> dict[str, Any]:
    """The versions of one shard's outputs that the dataset was made from."""
    moments = basis.shards[shard]
    return {
        "raw_samples": writer.headers[shard]["raw_samples"],
        "attention_embeddings": moments.attention_embeddings,
        "embedding_moments": moments.data_version,
        "scored_with_basis": basis.data_version,
        "lance_table": writer.tables[shard].table,
        "lance_version": writer.tables[shard].version,
        "rejected": sum(writer.rejected[shard].values()),
    }


def _files(
    artifacts: ArtifactStore, subset: pl.DataFrame, writer: DatasetWriter, path: UPath, n_bytes: int
) -> dict[str, Any]:
    """Hash, rows and size of each file, by its path from the manifest."""
    subset_path = artifacts.path(selected_subset.NAME, suffix=FRAME)
    subset_bytes = subset_path.read_bytes()
    return {
        path.name: {"sha256": writer.sha256, "rows": writer.n_rows, "bytes": n_bytes},
        f"../{selected_subset.NAME}/{subset_path.name}": {
            "sha256": hashlib.sha256(subset_bytes).hexdigest(),
            "rows": subset.height,
            "bytes": len(subset_bytes),
        },
    }


def expected(state: StoreState) -> str:
    """The provenance that the files would have if they were written now."""
    subset = state.header(selected_subset.ASSET)
    basis = state.header(subspace_basis.ASSET)
    in_basis = parse_basis_header(state.artifacts, basis).shards if basis else {}
    return provenance(
        state.selection,
        subset.get("provenance", ""),
        subset.get("data_version", ""),
        state.version(subspace_basis.ASSET),
        sorted(set(state.shards) - set(in_basis)),
    )


def header(state: StoreState) -> OutputHeader:
    """The manifest, or an empty header if the manifest or a file that it names is missing or damaged."""
    complete = is_complete(state.artifacts, state.verified.sha256)
    return read_manifest(state.artifacts) if complete else {}


ASSET = PoolAsset(
    name=NAME,
    code_version=CODE_VERSION,
    build=build,
    expected=expected,
    header=header,
    error_checks=(ROWS_CHECK, EXPORTS_CHECK),
)
