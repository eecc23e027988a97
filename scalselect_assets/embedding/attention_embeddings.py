"""Step 2, by shard: one vector per sample, from the first layer of the target VLM.

Holds: a LanceDB table per model and shard, and the list of all rows of the shard that have no vector. Each
row ends in exactly one of the two. Costs: the vision tower, the projector and one decoder layer per sample;
memory of the shard's vectors and one batch.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import dagster as dg
import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import Field

from scalselect_assets.asset_path import OutputHeader, ShardAsset, StoreState
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import reuse
from scalselect_assets.pool import raw_samples
from scalselect_assets.recording import data_versions
from scalselect_assets.recording.checks import require_passed
from scalselect_assets.recording.columns import (
    ATTENTION_EMBEDDINGS,
    REJECTED_ROWS,
    column_schema,
    polars_schema,
)
from scalselect_assets.recording.materialization import Output, materialize_shards
from scalselect_assets.recording.partitions import shard_check
from scalselect_assets.recording.records import RunRecords
from scalselect_assets.resources.artifacts import FRAME, RECORD, ArtifactCorruptError, ArtifactMissingError
from scalselect_assets.resources.embedding_store import EmbeddingStore, EmbeddingTable
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.progress import Log, Progress
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.resources.vlm import VlmResource

if TYPE_CHECKING:
    from scalselect_assets.method.representation.encoder import ChatSample, Outcome, Representation
    from scalselect_assets.method.representation.image_place import EffectivePlace

from scalselect_assets.embedding.device_pool import DEVICE_POOL
from scalselect_assets.embedding.receipts import CODE_VERSION, NAME, REJECTED, provenance, recorded_table

ROWS_CHECK = "every_row_is_embedded_or_rejected"


class EmbeddingConfig(dg.Config):
    """The settings that a person can choose for one run."""

    embed_again: bool = Field(
        default=False, description="Embed every row, also those whose vector is known and would be the same."
    )


def build(selection: Selection) -> dg.AssetsDefinition:
    """The asset for one selection."""

    @dg.asset(
        **selection.asset_options(NAME, by_shard=True),
        deps=[selection.key(raw_samples.NAME)],
        kinds={"pytorch", "huggingface", "lancedb"},
        code_version=data_versions.shown_code_version(CODE_VERSION, **selection.target),
        pool=DEVICE_POOL,
        metadata={"dagster/column_schema": column_schema(ATTENTION_EMBEDDINGS)},
        check_specs=[
            shard_check(
                selection.partitions,
                selection.key(NAME),
                ROWS_CHECK,
                "Rows of the shard = embedded rows + rejected rows, with no row in both.",
            ),
            shard_check(
                selection.partitions,
                selection.key(NAME),
                "some_rows_are_embedded",
                "The shard adds to the selection; one whose rows are all rejected does not.",
            ),
        ],
    )
    def attention_embeddings(
        context: dg.AssetExecutionContext,
        config: EmbeddingConfig,
        storage: StorageResource,
        vlm: VlmResource,
        progress: dg.ResourceParam[Progress],
    ) -> dg.MaterializeResult:
        """One vector per sample: the mean first-layer state of the vision tokens that the text attends to."""
        log = RunRecords(context).log
        embedding = _Embedding(selection, storage, vlm, progress, log, again=config.embed_again)
        return materialize_shards(context, storage.locks(selection.store), embedding.make)

    return attention_embeddings


class _Embedding:
    """Embeds shards: it reuses known vectors and computes the others with the model."""

    def __init__(
        self,
        selection: Selection,
        storage: StorageResource,
        vlm: VlmResource,
        progress: Progress,
        log: Log,
        *,
        again: bool,
    ) -> None:
        self._selection, self._vlm, self._progress, self._log = selection, vlm, progress, log
        self._artifacts = storage.artifacts(selection.store)
        self._tables = storage.embeddings(selection.store)
        self._source = selection.open_pool(storage)
        self._card = vlm.card(self._artifacts, **selection.target)
        self._conditions = {
            "fingerprint": self._card["fingerprint"],
            "max_image_pixels": str(vlm.max_image_pixels),
        }
        self._again = again

    def make(self, shard: str) -> Output:
        """Embed a shard, commit its table and then its receipt."""
        start = time.monotonic()
        raw, raw_header = self._artifacts.read_frame(raw_samples.NAME, shard)
        candidates = raw.filter(pl.col("reason").is_null())
        kept = self._kept(shard, candidates)
        computed = self._computed(shard, candidates, kept)
        done = dict(self._progress.track(chain(kept.items(), computed), shard, candidates.height, self._log))
        outcomes = [done[place] for place in range(candidates.height)]
        rejected = _rejected_rows(raw, candidates, outcomes, shard, str(self._source.shard_path(shard)))
        notes = {"max_image_pixels": self._conditions["max_image_pixels"]}
        table = _replace_table(self._tables, self._card, shard, candidates, outcomes, notes)
        # Check this before the receipt is written: the receipt makes the new table the shard's table.
        accounted = _accounting(raw, rejected, table)
        require_passed(accounted)
        # The manifest and the export also use the rejected rows and the kind of the file.
        data_version = digest(
            table.fingerprint,
            table.content_sha256,
            raw_header["container"],
            raw.height,
            hashlib.sha256(rejected.write_ndjson().encode()).hexdigest(),
        )
        made_from = provenance(table.fingerprint, self._vlm.max_image_pixels, raw_header["data_version"])
        stated = data_versions.header(
            data_version,
            made_from,
            raw_samples=raw_header["data_version"],
            raw_rows=str(raw.height),
            container=raw_header["container"],
            max_image_pixels=self._conditions["max_image_pixels"],
        )
        rejected_path, _ = self._artifacts.write_frame(REJECTED, rejected, stated, shard)
        # The receipt is written last, because it makes the new table the shard's table.
        self._artifacts.write_json(NAME, {"table": table.to_json(), "header": stated}, shard)
        reuse.forget(self._artifacts, shard)
        seconds = time.monotonic() - start
        return Output(
            data_version,
            made_from,
            {
                "dagster/partition_row_count": table.n_rows,
                "raw_rows": raw.height,
                "computed_rows": table.n_rows - len(kept),
                "reused_rows": len(kept),
                "rejected_rows": rejected.height,
                "rejected_by_reason": raw_samples.reason_counts(rejected),
                "rejected_rows_file": dg.MetadataValue.path(str(rejected_path)),
                "seconds": seconds,
                "samples_per_second": (candidates.height - len(kept)) / seconds,
                "bytes": 4 * table.dimension * table.n_rows,
                "dimension": table.dimension,
                "lance_table": table.table,
                "lance_version": table.version,
                "dagster/uri": str(self._tables.location(table)),
                "model": self._card["model"],
                "model_fingerprint": table.fingerprint,
            },
            (accounted, _not_empty(raw, table)),
        )

    def _kept(self, shard: str, candidates: pl.DataFrame) -> "dict[int, Representation]":
        """Vectors that the shard has already, by place among the candidates."""
        if self._again:
            return {}
        committed = self._committed(shard)
        known = reuse.known_vectors(self._artifacts, self._tables, shard, self._conditions, committed)
        keys, images = candidates["sample_key"].to_list(), candidates["images"].to_list()
        return reuse.unchanged(known, keys, images, self._source.open_image)

    def _committed(self, shard: str) -> tuple[EmbeddingTable, reuse.Conditions] | None:
        """The shard's table of the present model, if there is one, and the conditions of its vectors.

        If the receipt names another model's table, an earlier table of the present model may still exist.
        """
        try:
            table, stated = recorded_table(self._artifacts, shard)
        except (ArtifactMissingError, ArtifactCorruptError):
            return None
        fingerprint = self._conditions["fingerprint"]
        if table.fingerprint == fingerprint:
            return table, {
                "fingerprint": fingerprint,
                "max_image_pixels": stated.get("max_image_pixels", ""),
            }
        earlier = self._tables.newest(fingerprint, shard)
        return earlier and (earlier[0], {"fingerprint": fingerprint, **earlier[1]})

    def _computed(
        self, shard: str, candidates: pl.DataFrame, kept: "Mapping[int, Representation]"
    ) -> "Iterator[tuple[int, Outcome]]":
        """The model's outcomes for all other candidates, by place, each yielded once it is computed."""
        new = [place for place in range(candidates.height) if place not in kept]
        if not new:
            return
        encoder = self._vlm.encoder(self._artifacts, **self._selection.target)
        outcomes = reuse.set_aside(
            encoder.encode_as_done(
                _chat_samples(candidates[new]), self._source.open_image, **self._vlm.speed(encoder)
            ),
            self._artifacts,
            shard,
            candidates["sample_key"].gather(new).to_list(),
            self._conditions,
            self._vlm.set_aside_seconds,
        )
        for place, outcome in outcomes:
            yield new[place], outcome


def _chat_samples(candidates: pl.DataFrame) -> list["ChatSample"]:
    from scalselect_assets.method.representation.conversation import Conversation
    from scalselect_assets.method.representation.encoder import ChatSample

    return [
        ChatSample(Conversation.from_json(conversation), tuple(images))
        for conversation, images in candidates.select("conversation", "images").iter_rows()
    ]


def _replace_table(
    tables: EmbeddingStore,
    card: dict[str, Any],
    shard: str,
    candidates: pl.DataFrame,
    outcomes: list["Outcome"],
    notes: Mapping[str, str],
) -> EmbeddingTable:
    """Commit the vectors of the shard's embedded rows."""
    from scalselect_assets.method.representation.encoder import Representation

    representations = tuple(outcome for outcome in outcomes if isinstance(outcome, Representation))
    embedded = candidates.filter(
        pl.Series([isinstance(outcome, Representation) for outcome in outcomes], dtype=pl.Boolean)
    )
    dimension = card["dimension"]
    return tables.replace(
        card["fingerprint"],
        shard,
        dimension=dimension,
        rows=embedded["row"].to_list(),
        sample_keys=embedded["sample_key"].to_list(),
        source_ids=embedded["source_id"].to_list(),
        vectors=np.array([item.vector for item in representations], np.float32).reshape(-1, dimension),
        # The text is stored with the vector, so that the training uses the same text as the embedding.
        attributes={
            **_attributes(representations),
            "asks_before_image": _asks_before_image(embedded, card["image_place"]),
            "images": pa.array(embedded["images"].to_list(), pa.list_(pa.string())),
            "text": pa.array(embedded["text"].to_list(), pa.string()),
        },
        notes=notes,
    )


def _asks_before_image(embedded: pl.DataFrame, place: "EffectivePlace") -> pa.Array:
    from scalselect_assets.method.representation.conversation import Conversation
    from scalselect_assets.method.representation.image_place import asks_before_its_image

    conversations = (Conversation.from_json(text) for text in embedded["conversation"])
    return pa.array([asks_before_its_image(one, place) for one in conversations], pa.bool_())


def _attributes(representations: tuple["Representation", ...]) -> dict[str, pa.Array]:
    types: dict[str, Any] = {
        "n_tokens": pa.int32(),
        "n_vision_tokens": pa.int32(),
        "n_dominant_tokens": pa.int32(),
        "n_instruction_tokens": pa.int32(),
        "vision_attention": pa.float32(),
        "image_sha256": pa.list_(pa.string()),
    }
    return {
        name: pa.array([getattr(item, name) for item in representations], dtype)
        for name, dtype in types.items()
    }


def _rejected_rows(
    raw: pl.DataFrame, candidates: pl.DataFrame, outcomes: list["Outcome"], shard: str, file: str
) -> pl.DataFrame:
    """All rows of the shard without a vector: those refused on reading and those that the model refused."""
    from scalselect_assets.method.representation.rejection import Rejection

    verdicts = candidates.select("row").with_columns(
        reason=pl.Series(
            [item.reason.value if isinstance(item, Rejection) else None for item in outcomes], dtype=pl.String
        ),
        detail=pl.Series(
            [item.detail if isinstance(item, Rejection) else None for item in outcomes], dtype=pl.String
        ),
    )
    return (
        raw.update(verdicts, on="row")
        .filter(pl.col("reason").is_not_null())
        .with_columns(shard=pl.lit(shard), file=pl.lit(file))
        .select(polars_schema(REJECTED_ROWS).names())
        .sort("row")
    )


def _accounting(raw: pl.DataFrame, rejected: pl.DataFrame, table: EmbeddingTable) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name=ROWS_CHECK,
        passed=raw.height == table.n_rows + rejected.height and rejected["row"].is_unique().all(),
        metadata={"raw": raw.height, "embedded": table.n_rows, "rejected": rejected.height},
    )


def _not_empty(raw: pl.DataFrame, table: EmbeddingTable) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name="some_rows_are_embedded",
        passed=table.n_rows > 0,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"raw": raw.height, "embedded": table.n_rows},
    )


def expected(state: StoreState, shard: str) -> str | None:
    """The provenance that a shard's vectors would have now."""
    raw_version = state.version(raw_samples.ASSET, shard)
    return provenance(state.model_fingerprint(), state.vlm.max_image_pixels, raw_version)


def header(state: StoreState, shard: str) -> OutputHeader:
    """The header of a shard's vectors; empty where receipt, table or rejected rows are missing or damaged."""
    try:
        table, stated = recorded_table(state.artifacts, shard)
    except (ArtifactMissingError, ArtifactCorruptError):
        return {}
    rejected = state.frame_header(REJECTED, shard)
    is_whole = table.table in state.table_names and rejected.get("provenance") == stated["provenance"]
    return stated if is_whole else {}


ASSET = ShardAsset(
    name=NAME,
    code_version=CODE_VERSION,
    build=build,
    expected=expected,
    header=header,
    shard_files=((NAME, RECORD), (REJECTED, FRAME)),
    error_checks=(ROWS_CHECK,),
)
