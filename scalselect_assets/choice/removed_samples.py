"""Step 5a, all shards: the samples that are not to be chosen, each with what it repeats.

Holds: contaminated samples, whose image or text an evaluation set has (`decontamination`), and duplicates of
samples of higher leverage (`near_duplicates`), among those that are not contaminated. The choice excludes
them, and the training dataset its text-only rows among them; nothing is deleted. Costs: by shard what is
contaminated, computed where its rows or the evaluation set changed and kept otherwise; for duplicates a
search over the vectors of the pool.
"""

import hashlib
import time
from typing import Any, Final

import dagster as dg
import polars as pl

from scalselect_assets.asset_path import OutputHeader, PoolAsset, StoreState
from scalselect_assets.choice import (
    contentless_pictures,
    decontamination,
    duplicate_removal,
    image_hashes,
)
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts
from scalselect_assets.pool import raw_samples
from scalselect_assets.recording import data_versions
from scalselect_assets.recording.checks import require_passed
from scalselect_assets.recording.columns import Column, Table, column_schema, polars_schema
from scalselect_assets.recording.materialization import Output, at_work
from scalselect_assets.resources.artifacts import FRAME, ArtifactStore
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.subspace import importance_scores, subspace_basis

NAME: Final = "removed_samples"
CODE_VERSION: Final = "2"

REMOVED_SAMPLES: Table = {
    "shard": duplicate_removal.NEAR_DUPLICATES["shard"],
    "row": duplicate_removal.NEAR_DUPLICATES["row"],
    "sample_key": duplicate_removal.NEAR_DUPLICATES["sample_key"],
    "reason": Column(
        pl.String(),
        "evaluation_image, evaluation_text, contentless_picture, exact_duplicate or near_duplicate.",
    ),
    "partner": Column(
        pl.String(),
        "The evaluation file that it repeats, of a text with line and beginning; null for samples.",
    ),
    "partner_shard": duplicate_removal.NEAR_DUPLICATES["partner_shard"],
    "partner_row": duplicate_removal.NEAR_DUPLICATES["partner_row"],
    "partner_key": duplicate_removal.NEAR_DUPLICATES["partner_key"],
    "cosine": duplicate_removal.NEAR_DUPLICATES["cosine"],
    "same_pictures": duplicate_removal.NEAR_DUPLICATES["same_pictures"],
    "question_likeness": duplicate_removal.NEAR_DUPLICATES["question_likeness"],
    "text_likeness": duplicate_removal.NEAR_DUPLICATES["text_likeness"],
    "distance": decontamination.DECONTAMINATION["distance"],
    "overlap": decontamination.DECONTAMINATION["overlap"],
    "detail": Column(pl.String(), "What was found, and what else matches; null for duplicates."),
}


def provenance(selection: Selection, storage: StorageResource, basis_version: str) -> str:
    """The hash of what the list is computed from; the scores cover vectors, texts and images.

    Args:
        selection: The selection that declares what is removed.
        storage: Reads the evaluation set's files, those that it does not remember.
        basis_version: The version of the basis, which covers the scores of every shard in it.

    Raises:
        dg.Failure: The evaluation set cannot be used.
    """
    contaminated, duplicates = selection.decontamination, selection.near_duplicates
    return data_versions.provenance(
        NAME,
        CODE_VERSION,
        code=[decontamination.CODE_VERSION, duplicate_removal.CODE_VERSION],
        decontamination=contaminated and contaminated.matching(),
        evaluation_set=decontamination.version_of(storage, selection),
        near_duplicates=duplicates and duplicates.model_dump(),
        contentless_pictures=selection.contentless_pictures == "remove" and contentless_pictures.KIND,
        importance_scores=importance_scores.pool_version(basis_version),
    )


def read_removed(artifacts: ArtifactStore, selection: Selection) -> tuple[pl.DataFrame, str]:
    """The removed samples and their version; none and an empty version where the selection removes none.

    Raises:
        ArtifactMissingError: Not materialized.
    """
    if not selection.removes_samples:
        return pl.DataFrame(schema=polars_schema(REMOVED_SAMPLES)), ""
    frame, header = artifacts.read_frame(NAME)
    return frame, header["data_version"]


def build(selection: Selection) -> dg.AssetsDefinition:
    """The asset for one selection."""

    @dg.asset(
        **selection.asset_options(NAME, by_shard=False),
        deps=[
            selection.key(name)
            for name in (
                importance_scores.NAME,
                subspace_basis.NAME,
                receipts.NAME,
                raw_samples.NAME,
            )
        ],
        kinds={"lancedb", "numpy", "parquet"},
        code_version=data_versions.shown_code_version(
            CODE_VERSION,
            decontamination=selection.decontamination and selection.decontamination.model_dump(),
            near_duplicates=selection.near_duplicates and selection.near_duplicates.model_dump(),
            contentless_pictures=selection.contentless_pictures,
        ),
        metadata={"dagster/column_schema": column_schema(REMOVED_SAMPLES)},
        check_specs=[
            dg.AssetCheckSpec(
                duplicate_removal.PARTNERS_CHECK,
                asset=selection.key(NAME),
                description="No sample is removed twice, or for one that is removed itself.",
            ),
            dg.AssetCheckSpec(
                "every_evaluation_file_is_read",
                asset=selection.key(NAME),
                description="No file of the evaluation set's kinds is passed over.",
            ),
            dg.AssetCheckSpec(
                "no_shard_is_removed_whole",
                asset=selection.key(NAME),
                description="No shard is a copy of the evaluation set, as one whose rows all match it is.",
            ),
        ],
    )
    def removed_samples(context: dg.AssetExecutionContext, storage: StorageResource) -> dg.MaterializeResult:
        """Duplicates and samples of the evaluation set with what they repeat; pictures that show nothing."""
        with at_work(context, storage.locks(selection.store)):
            return find_removed(selection, storage).result()

    return removed_samples


def find_removed(selection: Selection, storage: StorageResource) -> Output:
    """Find the samples that are not to be chosen, and write them.

    Raises:
        dg.Failure: The evaluation set cannot be used, or a shard was scored with another basis.
    """
    start = time.monotonic()
    artifacts = storage.artifacts(selection.store)
    subspace, basis = subspace_basis.read_basis(artifacts)
    evaluation = decontamination.evaluation_of(storage, selection)
    looked = decontamination.look(storage, selection, evaluation, sorted(basis.shards))
    numbers: dict[str, Any] = dict(looked.numbers)
    contentless = pl.DataFrame(schema=polars_schema(contentless_pictures.CONTENTLESS))
    if selection.contentless_pictures == "remove":
        source = storage.samples(selection.source, selection.image_root, selection.store)
        contentless = contentless_pictures.find(artifacts, sorted(basis.shards), source.open_image)
        contentless = contentless.join(looked.frame, on=["shard", "row"], how="anti")
    duplicates = pl.DataFrame(schema=polars_schema(duplicate_removal.NEAR_DUPLICATES))
    if selection.near_duplicates is not None:
        pool = duplicate_removal.read_pool(artifacts, storage.embeddings(selection.store), basis)
        clean = duplicate_removal.without(duplicate_removal.without(pool, looked.frame), contentless)
        duplicates, found = duplicate_removal.find(
            clean, subspace, selection.near_duplicates, to_unit_length=selection.unit_rows
        )
        numbers |= found
    frame = _joined(looked.frame, contentless, duplicates)
    partners = duplicate_removal.partners_kept(duplicates)
    require_passed(partners)
    data_version = digest(hashlib.sha256(frame.write_ndjson().encode()).hexdigest())
    made_from = provenance(selection, storage, basis.data_version)
    passed_over = decontamination.files_passed_over(storage, selection)
    path, size = artifacts.write_frame(NAME, frame, data_versions.header(data_version, made_from))
    return Output(
        data_version,
        made_from,
        {
            "dagster/row_count": frame.height,
            "embedded": subspace.n,
            "removed_by_reason": raw_samples.reason_counts(frame),
            **numbers,
            "basis_version": basis.data_version,
            "seconds": time.monotonic() - start,
            "bytes": size,
            "dagster/uri": str(path),
        },
        (
            partners,
            dg.AssetCheckResult(
                check_name="every_evaluation_file_is_read",
                passed=not passed_over,
                severity=dg.AssetCheckSeverity.WARN,
                metadata={"passed_over": passed_over},
            ),
            dg.AssetCheckResult(
                check_name="no_shard_is_removed_whole",
                passed=not looked.whole_shards,
                severity=dg.AssetCheckSeverity.WARN,
                metadata={"shards": list(looked.whole_shards)[:100]},
            ),
        ),
    )


def _joined(*found: pl.DataFrame) -> pl.DataFrame:
    schema = polars_schema(REMOVED_SAMPLES)
    frames = [
        frame.with_columns(
            pl.lit(None, dtype).alias(name) for name, dtype in schema.items() if name not in frame.columns
        )
        .select(schema.names())
        .cast(schema)
        for frame in found
    ]
    return pl.concat(frames).sort(["shard", "row"])


def is_declared(selection: Selection) -> bool:
    """Whether a selection removes samples before the choice."""
    return selection.removes_samples


def expected(state: StoreState) -> str:
    """The provenance that the list would have now."""
    return provenance(state.selection, state.storage, state.version(subspace_basis.ASSET))


def header(state: StoreState) -> OutputHeader:
    """The header of the list; empty where it is missing or damaged."""
    return state.frame_header(NAME)


ASSET = PoolAsset(
    name=NAME,
    code_version=CODE_VERSION,
    build=build,
    is_declared=is_declared,
    expected=expected,
    header=header,
    error_checks=(duplicate_removal.PARTNERS_CHECK,),
    shard_files=tuple(
        (name, FRAME) for name in (decontamination.NAME, image_hashes.IMAGE_HASHES, contentless_pictures.NAME)
    ),
)
