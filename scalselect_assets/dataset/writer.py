"""Writing the training dataset: one pass over the texts of the shards."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import dagster as dg
import polars as pl
from upath import UPath

from scalselect_assets.choice import removed_samples
from scalselect_assets.dataset.exports import publish
from scalselect_assets.dataset.exports.rows import ExportRow, RowSpool
from scalselect_assets.dataset.training_manifest import NAME
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts
from scalselect_assets.method.choice.budget import budget_size
from scalselect_assets.method.representation.rejection import RejectionReason
from scalselect_assets.pool import raw_samples
from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.resources.embedding_store import EmbeddingStore, EmbeddingTable
from scalselect_assets.resources.sample_source import SampleSource

_ROWS = pl.Schema({"row": pl.Int64(), "text": pl.String(), "images": pl.List(pl.String())})
# The additional columns that exports need.
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


def text_only_rows(
    artifacts: ArtifactStore, selection: Selection, shards: Sequence[str]
) -> dict[str, set[int]]:
    """The rows without an image that are kept, by shard: all, none, or a seeded draw within their budget.

    Each row's place in the draw is a hash of its key, so that most rows stay when the pool grows.

    Raises:
        dg.Failure: The budget asks for more rows without an image than there are.
    """
    if selection.text_only == "drop":
        return {}
    removed, _ = removed_samples.read_removed(artifacts, selection)
    frames = []
    for shard in shards:
        rejected, _ = artifacts.read_frame(
            receipts.REJECTED, shard, columns=["shard", "row", "sample_key", "reason"]
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


class DatasetWriter:
    """Writes the chosen rows of all shards into one file and into the exports' spool, and counts them."""

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
            self.tables[shard], self.headers[shard] = receipts.recorded_table(artifacts, shard)
        self._text_only, self._spool = text_only, spool
        self._schema = _ROWS if spool is None else _EXPORT_ROWS
        self._digest = hashlib.sha256()
        self.rejected: dict[str, dict[str, int]] = {}
        self.row_formats: dict[str, int] = {}
        self.n_rows = self.n_selected = self.n_text_only = 0

    @property
    def sha256(self) -> str:
        """The hash of the bytes written so far."""
        return self._digest.hexdigest()

    def write(
        self, subset: pl.DataFrame, before_it_counts: Callable[[], None] = lambda: None
    ) -> tuple[UPath, int]:
        """Replace the file, and return its path and its size in bytes.

        The file is JSON Lines if all shards are, else a JSON array.

        Args:
            subset: The chosen rows.
            before_it_counts: Called when all rows are written, before the file replaces the last one; if it
                raises an error, the last file stays.
        """
        # A shard without rows does not affect the format.
        lines = all(
            header["container"] == "lines" for header in self.headers.values() if header["raw_rows"] != "0"
        )
        path, other = (
            self._artifacts.path(NAME, "train", suffix=suffix)
            for suffix in ((".jsonl", ".json") if lines else (".json", ".jsonl"))
        )
        pieces = self._lines(subset) if lines else self._array(subset)
        size = self._artifacts.write_text(path, self._hashed(pieces, before_it_counts))
        other.unlink(missing_ok=True)  # the file of an earlier pool in the other format
        return path, size

    def _lines(self, subset: pl.DataFrame) -> Iterator[str]:
        return (f"{text}\n" for text in self._texts(subset))

    def _array(self, subset: pl.DataFrame) -> Iterator[str]:
        separator = "[\n"
        for text in self._texts(subset):
            yield f"{separator}{text}"
            separator = ",\n"
        yield "\n]\n"

    def _hashed(self, pieces: Iterator[str], at_the_end: Callable[[], None]) -> Iterator[str]:
        for piece in pieces:
            self._digest.update(piece.encode())
            yield piece
        at_the_end()

    def _texts(self, subset: pl.DataFrame) -> Iterator[str]:
        """The chosen rows' texts in pool order, unchanged since the embedding."""
        chosen = {str(shard): rows for (shard,), rows in subset.group_by("shard")}
        for shard in self.tables:
            rows = self._chosen_rows(shard, chosen[shard]) if shard in chosen else self._none()
            self.n_selected += rows.height
            text_only = self.text_only_rows(shard)
            self.n_text_only += text_only.height
            for row, text, images, *columns in pl.concat([rows, text_only]).sort("row").iter_rows():
                self.n_rows += 1
                if self._spool is not None:
                    values = dict(zip(_EXPORT_ROWS.names()[len(_ROWS) :], columns, strict=True))
                    self._spool.add(ExportRow(shard=shard, row=row, text=text, images=images, **values))
                row_format = "llava" if "conversations" in json.loads(text) else "sharegpt"
                self.row_formats[row_format] = self.row_formats.get(row_format, 0) + 1
                yield self._source.export_text(shard, text, images)

    def _chosen_rows(self, shard: str, chosen: pl.DataFrame) -> pl.DataFrame:
        """Rows of the shard's table by sample key.

        Raises:
            dg.Failure: A chosen key is not in the table, so the table is not the scored one.
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

    def text_only_rows(self, shard: str) -> pl.DataFrame:
        """The kept rows of the shard that have no image; all rejected rows are counted as well."""
        version = self.headers[shard]["data_version"]
        rejected = receipts.read_rejected(self._artifacts, shard, version)
        self.rejected[shard] = raw_samples.reason_counts(rejected)
        kept = rejected.filter(pl.col("row").is_in(self._text_only.get(shard, set())))
        if self._spool is not None:
            for record in rejected.join(kept, on="row", how="anti").sort("row").iter_rows(named=True):
                self._spool.add_rejection(publish.pool_record(shard, record))
        columns = {
            name: pl.lit([] if isinstance(dtype, pl.List) else None, dtype)
            for name, dtype in self._schema.items()
            if name not in kept.columns
        }
        return kept.with_columns(**columns).select(self._schema.names()).cast(self._schema)
