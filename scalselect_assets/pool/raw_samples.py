"""Step 1, by shard: every row of the shard file, read and judged.

The output holds all rows, rejected ones too, each with its verbatim text. A row is judged by its content and
by the presence of its images; step 2 reads the pixels. A row whose only fault is a missing image stays as it
was before (`missing_images`). Costs: the file is read for its rows and hashed before and after, so
that a change meanwhile is noticed; one stat per image; one shard is in memory.
"""

import hashlib
import time

import dagster as dg
import polars as pl
from pydantic import Field

from scalselect_assets.asset_path import OutputHeader, ShardAsset, StoreState
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.pool.missing_images import KEPT, kept_rows
from scalselect_assets.recording import data_versions
from scalselect_assets.recording.columns import RAW_SAMPLES, column_schema, polars_schema
from scalselect_assets.recording.materialization import Output, materialize_shards, retry_or_fail
from scalselect_assets.resources.artifacts import (
    FRAME,
    ArtifactCorruptError,
    ArtifactMissingError,
    ArtifactStore,
)
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.judged_rows import PoolRow
from scalselect_assets.resources.sample_source import SampleSource
from scalselect_assets.resources.shard_reader import ShardFormatError
from scalselect_assets.resources.storage import StorageResource

NAME = "raw_samples"
CODE_VERSION = "2"
SHARD_INDEXES = "shard_index-"
"""First part of the name of a shard's index; the version of the code that reads shards follows it."""
SHARD_INDEX = f"{SHARD_INDEXES}{CODE_VERSION}"


def provenance(selection: Selection, shard_version: str) -> str:
    """The hash of everything that the rows of one shard are computed from."""
    return data_versions.provenance(NAME, CODE_VERSION, image_root=selection.image_root, shard=shard_version)


class RowsConfig(dg.Config):
    """The settings of one run."""

    accept_missing_images: bool = Field(
        default=False,
        description="Accept that missing images are gone for good: their rows then lose their vectors. "
        "Otherwise these rows stay as they were.",
    )


def build(selection: Selection) -> dg.AssetsDefinition:
    """The asset for one selection."""

    @dg.asset(
        **selection.asset_options(NAME, by_shard=True),
        deps=[selection.key("shard_files")],
        kinds={"polars", "parquet"},
        code_version=data_versions.shown_code_version(CODE_VERSION, image_root=selection.image_root),
        metadata={"dagster/column_schema": column_schema(RAW_SAMPLES)},
    )
    def raw_samples(
        context: dg.AssetExecutionContext, config: RowsConfig, storage: StorageResource
    ) -> dg.MaterializeResult:
        """Every row of the shard, read, validated and given its content key, with what speaks against it."""
        artifacts = storage.artifacts(selection.store)
        source = selection.open_pool(storage)

        def read(shard: str) -> Output:
            start = time.monotonic()
            version = source.shard_fingerprint(shard, source.index_shard(shard))
            frame = read_rows(source, shard)
            if source.shard_fingerprint(shard, source.index_shard(shard)) != version:
                retry_or_fail(context, f"shard {shard!r} or one of its images changed while it was read")
            kept = 0
            if not config.accept_missing_images:
                frame, kept = kept_rows(_last_rows(artifacts, shard), frame)
            data_version = digest(version, hashlib.sha256(frame.write_ndjson().encode()).hexdigest())
            made_from = provenance(selection, version)
            without_image = {KEPT: str(kept)} if kept else {}
            stated = data_versions.header(
                data_version, made_from, container=source.container(shard), **without_image
            )
            path, size = artifacts.write_frame(NAME, frame, stated, shard)
            rejected = frame.filter(pl.col("reason").is_not_null())
            return Output(
                data_version,
                made_from,
                {
                    "dagster/partition_row_count": frame.height,
                    "rejected_rows": rejected.height,
                    KEPT: kept,
                    "rejected_by_reason": reason_counts(rejected),
                    "seconds": time.monotonic() - start,
                    "bytes": size,
                    "dagster/uri": str(path),
                    "shard_file": dg.MetadataValue.path(str(source.shard_path(shard))),
                    "shard_version": version,
                },
            )

        return materialize_shards(context, storage.locks(selection.store), read)

    return raw_samples


def read_rows(source: SampleSource, shard: str) -> pl.DataFrame:
    """One shard as a frame of `RAW_SAMPLES`.

    Raises:
        dg.Failure: The file is not a shard; there is no retry, since only another file helps.
    """
    try:
        return pl.DataFrame(
            [_record(row) for row in source.read_shard(shard)],
            schema=polars_schema(RAW_SAMPLES),
            orient="row",
        )
    except ShardFormatError as error:
        raise dg.Failure(str(error), allow_retries=False) from error


def _last_rows(artifacts: ArtifactStore, shard: str) -> pl.DataFrame | None:
    """The rows of a shard as they were read last; None if there are none or the file is damaged."""
    try:
        return artifacts.read_frame(NAME, shard)[0]
    except (ArtifactMissingError, ArtifactCorruptError):
        return None


def reason_counts(rejected: pl.DataFrame) -> dict[str, int]:
    """Rows by rejection reason, sorted by reason."""
    counts = rejected.group_by("reason").len().sort("reason")
    return dict(zip(counts["reason"].to_list(), counts["len"].to_list(), strict=True))


def _record(row: PoolRow) -> tuple[object, ...]:
    sample, rejection = row.sample, row.rejection
    return (
        row.row,
        row.line,
        row.sample_key,
        row.source_id,
        row.text,
        sample.row_format if sample else None,
        sample.conversation.to_json() if sample else None,
        list(row.image_paths),
        rejection.reason.value if rejection else None,
        rejection.detail if rejection else None,
    )


def expected(state: StoreState, shard: str) -> str | None:
    """The provenance that a shard's rows would have now; None if discovery did not read the shard."""
    version = state.shard_versions.get(shard)
    return None if version is None else provenance(state.selection, version)


def header(state: StoreState, shard: str) -> OutputHeader:
    """The header of a shard's rows; empty if the rows are missing or damaged."""
    return state.frame_header(NAME, shard)


ASSET = ShardAsset(
    name=NAME,
    code_version=CODE_VERSION,
    build=build,
    expected=expected,
    header=header,
    shard_files=((NAME, FRAME),),
)
