"""The galleries of the report: rows with their pictures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Final

import dagster as dg
import polars as pl

from scalselect_assets.choice.labels import source_of
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts
from scalselect_assets.report.content import (
    Gallery,
    GalleryItem,
    Picture,
    SourceCounts,
)
from scalselect_assets.report.gallery_sample import GallerySample, Overlay
from scalselect_assets.resources.embedding_store import EmbeddingTable
from scalselect_assets.resources.sample_source import SampleSource
from scalselect_assets.resources.samples import parse_row
from scalselect_assets.resources.storage import StorageResource
from scalselect_assets.subspace import importance_scores

_PICTURES: Final = 3  # of one sample
_QUESTION, _ANSWER, _LABEL = 480, 320, 80  # characters that are shown
_SOURCES: Final = 24  # rows of the composition; what is left is added up in one more


class ReportRows:
    """The pool's rows, embedded and rejected, counted by source; and those for the galleries, made ready.

    Attributes:
        rejected: Rows by reason.
        items: Gallery items by shard and row.
    """

    def __init__(
        self,
        storage: StorageResource,
        selection: Selection,
        subset: pl.DataFrame,
        overlay: Overlay | None,
        n: int,
    ) -> None:
        """The rows of the pool, of which ``n`` are embedded and those of ``subset`` selected."""
        self._artifacts = storage.artifacts(selection.store)
        self._embeddings = storage.embeddings(selection.store)
        self._images = selection.open_pool(storage)
        self._source_of, self._overlay_of, self._n = source_of(selection.source_label), overlay, n
        self._chosen = {str(shard): rows["row"] for (shard,), rows in subset.group_by("shard")}
        self._pool, self._embedded, self._selected = Counter[str](), Counter[str](), Counter[str]()
        self.rejected = Counter[str]()
        self.items: dict[tuple[str, int], GalleryItem] = {}

    def read(self, shards: Sequence[str], picks: pl.DataFrame) -> None:
        """Go through all rows once.

        Args:
            shards: Shards of the basis.
            picks: The samples for the galleries, as `ReportScores` gives them.
        """
        wanted = {str(shard): rows for (shard,), rows in picks.group_by("shard")}
        for shard in shards:
            table, header = receipts.recorded_table(self._artifacts, shard)
            columns = ["text", *(["images", "image_sha256"] if shard in wanted else [])]
            chosen = self._chosen.get(shard, pl.Series(dtype=pl.Int64))
            rows = pl.DataFrame(self._embeddings.read_rows(table, columns)).with_columns(
                is_selected=pl.col("row").is_in(chosen.implode())
            )
            sources = self._labels(shard, rows)
            self._embedded.update(sources)
            self._selected.update(compress(sources, rows["is_selected"]))
            rejected = receipts.read_rejected(
                self._artifacts, shard, header["data_version"], ["reason", "text"]
            )
            self.rejected.update(rejected["reason"].to_list())
            self._pool.update(sources)
            self._pool.update(self._labels(shard, rejected))
            if shard in wanted:
                labelled = rows.with_columns(source=pl.Series(sources, dtype=pl.String))
                self._show(table, labelled, wanted[shard])

    def composition(self) -> tuple[SourceCounts, ...]:
        """Rows by source, largest in the pool first; the smallest together where there are many."""
        ordered = sorted(self._pool, key=lambda source: (-self._pool[source], source))
        shown, others = ordered[:_SOURCES], ordered[_SOURCES:]
        counters = (self._pool, self._embedded, self._selected)
        rows = [SourceCounts(source, *(counter[source] for counter in counters)) for source in shown]
        if others:
            sums = (sum(counter[source] for source in others) for counter in counters)
            rows.append(SourceCounts(f"({len(others):,} more sources)", *sums))
        return tuple(rows)

    def _labels(self, shard: str, rows: pl.DataFrame) -> list[str]:
        # As labels come from anywhere, they may be long and hold what UTF-8 does not.
        return [
            _cut(self._source_of(shard, text), _LABEL).encode(errors="backslashreplace").decode()
            for text in rows["text"]
        ]

    def _show(self, table: EmbeddingTable, rows: pl.DataFrame, picks: pl.DataFrame) -> None:
        shard = table.shard
        held = picks.unique("row").join(rows, on="row").sort("row")
        if held.height != picks["row"].n_unique():
            raise dg.Failure(
                f"scored rows of shard {shard!r} are not in its table any more; run the refresh again",
                allow_retries=False,
            )
        for one in held.iter_rows(named=True):
            sample = GallerySample(
                one["sample_key"],
                shard,
                one["row"],
                one["text"],
                tuple(one["images"]),
                tuple(one["image_sha256"]),
                table.fingerprint,
            )
            question, answer, source_id, said = _words(sample.text)
            pictures, left_out = self._pictures(sample)
            self.items[shard, sample.row] = GalleryItem(
                sample_key=sample.sample_key,
                place=f"{shard}#{sample.row}",
                source_id=None if source_id is None else _cut(source_id, _LABEL),
                source=one["source"],
                question=question,
                answer=answer,
                leverage=one["leverage"],
                normalised_leverage=one["normalised_leverage"],
                rank=one["rank"],
                percentile=importance_scores.percentile(one["rank"], self._n),
                is_selected=one["is_selected"],
                pictures=pictures,
                overlay=self._overlay(sample),
                note=" ".join([*said, *left_out]),
            )

    def _pictures(self, sample: GallerySample) -> tuple[tuple[Picture, ...], list[str]]:
        shown = sample.images[:_PICTURES]
        pictures = tuple(
            _picture(self._images, path, f"Image {number} of {len(sample.images)} of row {sample.row}")
            for number, path in enumerate(shown, start=1)
        )
        n_left_out = len(sample.images) - len(shown)
        return pictures, [f"{n_left_out} more images."] if n_left_out else []

    def _overlay(self, sample: GallerySample) -> Picture | None:
        data = self._overlay_of(sample) if self._overlay_of else None
        if data is None:
            return None
        return _thumbnail(data, f"Attention of the instruction over the image of row {sample.row}")


def _words(text: str) -> tuple[str, str, str | None, list[str]]:
    """Question, answer and id of a row, and what is left out of it."""
    parsed = parse_row(text)
    if parsed.sample is None:
        detail = parsed.rejection.detail if parsed.rejection else ""
        return _cut(text, _QUESTION), "", parsed.source_id, [f"Shown as it is: {detail}."]
    turns = parsed.sample.conversation.turns
    said = [
        (turn.role, " ".join(part for part in turn.parts if isinstance(part, str)).strip()) for turn in turns
    ]
    question = next((words for role, words in said if role == "user"), "")
    answer = next(words for role, words in said if role == "assistant")  # every sample has one
    n_more = sum(role != "system" for role, _ in said) - 2
    return (
        _cut(question, _QUESTION),
        _cut(answer, _ANSWER),
        parsed.source_id,
        [f"{n_more} more turns follow."] if n_more > 0 else [],
    )


def _picture(source: SampleSource, path: str, alt: str) -> Picture:
    """The thumbnail of an image of the pool, or why there is none; faults that may pass are raised.

    Raises:
        OSError: The image cannot be read now, which says nothing about it.
    """
    try:
        data = source.open_image(path)
    except (FileNotFoundError, PermissionError) as error:
        return Picture(alt, problem=str(error))
    return _thumbnail(data, alt)


def _thumbnail(data: bytes, alt: str) -> Picture:
    from scalselect_assets.method.representation.images import ImageTooLargeError, UndecodableImageError
    from scalselect_assets.report.pictures import thumbnail

    try:
        return thumbnail(data, alt)
    except (UndecodableImageError, ImageTooLargeError) as error:
        return Picture(alt, problem=str(error))


def galleries(picks: pl.DataFrame, items: Mapping[tuple[str, int], GalleryItem]) -> tuple[Gallery, ...]:
    """The galleries in order, with what they show."""
    described = {
        "highest": ("Highest leverage", "The samples on which the kept directions rest most."),
        "median": (
            "Median leverage",
            "The samples nearest to the middle: half the pool has more, half less.",
        ),
        "lowest": ("Lowest leverage", "The samples that the rest of the pool makes most nearly redundant."),
    }
    return tuple(
        Gallery(
            name,
            description,
            tuple(
                items[place]
                for place in picks.filter(pl.col("gallery") == gallery).select("shard", "row").iter_rows()
            ),
        )
        for gallery, (name, description) in described.items()
    )


def _cut(text: str, length: int) -> str:
    """``text``, or as much of it as is shown."""
    return text if len(text) <= length else f"{text[:length].rstrip()}… ({len(text):,} characters)"
