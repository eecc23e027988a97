"""The only definition of every table's columns, for files, the UI's column schema and the documentation."""

from collections.abc import Mapping
from dataclasses import dataclass

import dagster as dg
import polars as pl


@dataclass(frozen=True, slots=True)
class Column:
    """Type and meaning of one column; it is nullable only if the meaning says so."""

    dtype: pl.DataType
    description: str


Table = Mapping[str, Column]

_KEY = Column(
    pl.String(), "Content hash of the sample; see scalselect_assets.resources.samples for what it covers."
)
_SOURCE_ID = Column(pl.String(), "The row's own id, verbatim as text; null where it has none.")
_ROW = Column(pl.Int64(), "Position of the row in its shard, from 0.")
_LINE = Column(pl.Int64(), "Line of the shard file where the row starts, from 1.")
_SHARD = Column(pl.String(), "Partition key of the shard.")

RAW_SAMPLES: Table = {
    "row": _ROW,
    "line": _LINE,
    "sample_key": _KEY,
    "source_id": _SOURCE_ID,
    "text": Column(pl.String(), "The row's JSON, verbatim."),
    "row_format": Column(pl.String(), "sharegpt (messages) or llava (conversations); null if rejected."),
    "conversation": Column(pl.String(), "Canonical JSON of the turns; null if rejected."),
    "images": Column(pl.List(pl.String()), "Image paths relative to the image root, in order."),
    "reason": Column(pl.String(), "Why the row is rejected; null if it goes on."),
    "detail": Column(pl.String(), "What was found and what to do; null if it goes on."),
}

REJECTED_ROWS: Table = {
    "shard": _SHARD,
    "file": Column(pl.String(), "The shard file."),
    "row": _ROW,
    "line": _LINE,
    "sample_key": _KEY,
    "source_id": _SOURCE_ID,
    "reason": Column(
        pl.String(), "Typed reason (scalselect_assets.method.representation.rejection.RejectionReason)."
    ),
    "detail": Column(pl.String(), "What was found and what to do."),
    "text": Column(pl.String(), "The row's JSON, verbatim."),
}

ATTENTION_EMBEDDINGS: Table = {
    "row": _ROW,
    "sample_key": _KEY,
    "vector": Column(pl.List(pl.Float32()), "Mean first-layer output of the dominant vision tokens, (d,)."),
    "source_id": _SOURCE_ID,
    "n_tokens": Column(pl.Int32(), "Length of the model's input."),
    "n_vision_tokens": Column(pl.Int32(), "Image tokens in it."),
    "n_dominant_tokens": Column(pl.Int32(), "Vision tokens kept; the vector is their mean."),
    "n_instruction_tokens": Column(pl.Int32(), "Tokens that are neither vision nor an answer's content."),
    "vision_attention": Column(pl.Float32(), "Share of the instruction's attention on vision tokens."),
    "asks_before_image": Column(
        pl.Boolean(),
        "Whether no text of the user follows the last image in the prompt, so that no question can attend to "
        "it; absent where an earlier release has embedded the shard.",
    ),
    "image_sha256": Column(pl.List(pl.String()), "SHA-256 of each image's bytes, in order."),
    "images": Column(pl.List(pl.String()), "Image paths relative to the image root, in order."),
    "text": Column(pl.String(), "The row's JSON, verbatim."),
    "row_sha256": Column(pl.Binary(), "Of the vector with row, key and id; compared whenever it is read."),
}

IMPORTANCE_SCORES: Table = {
    "row": _ROW,
    "sample_key": _KEY,
    "source_id": _SOURCE_ID,
    "leverage": Column(
        pl.Float64(), "Rank-k leverage score in [0, 1]; under one basis they sum to k over all shards."
    ),
    "normalised_leverage": Column(
        pl.Float64(),
        "n·leverage/k, rounded to the digits that are exact: 1 on average, whatever the size of the pool. "
        "Samples are ranked by it.",
    ),
}

STRONGEST_DIRECTIONS = Column(
    pl.List(pl.Struct({"direction": pl.Int32(), "share": pl.Float64(), "coordinate": pl.Float64()})),
    "The directions that most of the leverage comes from, strongest first: number from 1, share of the "
    "leverage, and coordinate in that direction, whose sign tells the side of the mean.",
)

SELECTED_SUBSET: Table = {
    "rank": Column(
        pl.Int64(),
        "Place in the choice, from 1: rows on the list to include, then by the strategy's preference.",
    ),
    "sample_key": _KEY,
    "source_id": _SOURCE_ID,
    "shard": _SHARD,
    "row": _ROW,
    "leverage": IMPORTANCE_SCORES["leverage"],
    "normalised_leverage": IMPORTANCE_SCORES["normalised_leverage"],
    "source": Column(pl.String(), "The row's source, by the selection's `source_label`."),
    "n_text_tokens": Column(pl.Int64(), "Tokens of the model's input that are not vision tokens."),
    "n_image_tokens": Column(pl.Int64(), "Vision tokens."),
    "why": Column(pl.String(), "`included` (it is on the list), `kept` (of the last subset), or `chosen`."),
    "gain": Column(
        pl.Float64(),
        "What it adds to the span (spanning), or added to the coverage when it was picked (coverage); null "
        "with other strategies.",
    ),
    "inclusion_probability": Column(
        pl.Float64(), "Probability with which it was drawn, for weighting; null where nothing is drawn."
    ),
    "strongest_directions": STRONGEST_DIRECTIONS,
}

MOMENTS: Table = {
    "n": Column(pl.Int64(), "Number of vectors."),
    "mean": Column(pl.List(pl.Float64()), "Their mean, (d,)."),
    "scatter_upper": Column(
        pl.List(pl.Float64()),
        "Upper triangle by rows of the sum of (x - mean)(x - mean)ᵀ, (d (d + 1) / 2,).",
    ),
}

SPECTRUM: Table = {
    "direction": Column(pl.Int64(), "Principal direction of the centred embeddings, from 1."),
    "singular_value": Column(pl.Float64(), "Of the centred embedding matrix."),
    "energy": Column(pl.Float64(), "Share of the total energy up to and including this direction."),
    "kept": Column(pl.Boolean(), "Whether the direction belongs to the subspace."),
}

RANK_ALTERNATIVES: Table = {
    "rule": Column(pl.String(), "Another way to choose the rank."),
    "k": Column(pl.Int64(), "The rank that it gives."),
    "energy": Column(pl.Float64(), "Share of the energy that these directions hold."),
    "overlap": Column(
        pl.Float64(),
        "Share of the choice with the present rule, the first row, that this one would make, too; null where "
        "the rank is too large to compare.",
    ),
    "chosen_samples": Column(pl.Int64(), "Samples that either chooses, by the budget of this moment."),
    "compared_samples": Column(pl.Int64(), "Samples that they choose from; all of a small pool."),
}

COMPOSITION: Table = {
    "source": Column(pl.String(), "Where the rows are from, as the report labels them."),
    "pool": Column(pl.Int64(), "Rows in the pool."),
    "embedded": Column(pl.Int64(), "Rows with a vector."),
    "selected": Column(pl.Int64(), "Rows in the selection."),
}

TRAINING_ROWS: Table = {
    "id": Column(pl.String(), "As in the pool; absent where the row has none."),
    "messages": Column(pl.List(pl.String()), "Turns with role and content; `conversations` in LLaVA rows."),
    "images": Column(pl.List(pl.String()), "Image paths; `image` in LLaVA rows. Further fields are kept."),
}


def polars_schema(table: Table) -> pl.Schema:
    """The table's schema for Polars."""
    return pl.Schema({name: column.dtype for name, column in table.items()})


def column_schema(table: Table) -> dg.TableSchema:
    """The table's schema for the Dagster UI."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(name=name, type=str(column.dtype), description=column.description)
            for name, column in table.items()
        ]
    )
