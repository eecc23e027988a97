"""Beside the path, all shards: the selection as a page for people.

Holds: one self-contained HTML page, see `scalselect_assets.report`, and a receipt that names its versions.
Costs: four or five passes over the scores, of one or two columns mostly; one pass over the pool's texts; some
dozen images. Memory: one shard, the places of the selected rows, and what the page shows.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import dagster as dg
import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import AfterValidator
from upath import UPath

from resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from resources.embedding_store import EmbeddingTable
from resources.identity import digest
from resources.image_root import is_local
from resources.sample_source import SampleSource
from resources.samples import parse_row
from resources.storage import StorageResource
from resources.vlm import VlmResource
from scalselect_assets import (
    attention_embeddings,
    comparison,
    importance_scores,
    lineage,
    plots,
    selected_subset,
    subspace_basis,
    training_dataset,
)
from scalselect_assets.materialization import Output, at_work
from scalselect_assets.method.interrupts import deferred
from scalselect_assets.method.rejection import RejectionReason
from scalselect_assets.pool_rows import source_of
from scalselect_assets.report import charts, told
from scalselect_assets.report.content import (
    Churn,
    Counts,
    Fact,
    Gallery,
    GalleryItem,
    LeverageProfile,
    Picture,
    RejectedReason,
    ReportContent,
    SourceCounts,
)
from scalselect_assets.report.distribution import LeverageCounts
from scalselect_assets.selection import Selection
from scalselect_assets.shown_attention import AttentionOverlays
from scalselect_assets.tables import COMPOSITION, column_schema

NAME = "selection_report"
PAGE = "report"
RECEIPT = "receipt"
CODE_VERSION = "1"

GALLERY_SIZE: Final = 8
_PICTURES: Final = 3  # of one sample
_QUESTION, _ANSWER, _LABEL = 480, 320, 80  # characters that are shown
_SOURCES: Final = 24  # rows of the composition; what is left is added up in one more
_MANIFEST_SHARDS: Final = 40

_MEANINGS: Final[Mapping[RejectionReason, str]] = {
    RejectionReason.MALFORMED_ROW: "not JSON, not an object, no turns, an unknown role, or no answer",
    RejectionReason.DUPLICATE: "repeats an earlier row of its shard, text and images",
    RejectionReason.TEXT_ONLY: "has no image",
    RejectionReason.IMAGE_COUNT_MISMATCH: "image marks and images differ in number",
    RejectionReason.NO_INSTRUCTION_TEXT: "no text beside the answers",
    RejectionReason.OUTSIDE_IMAGE_ROOT: "the image's path leads out of the image root",
    RejectionReason.MISSING_IMAGE: "the image is not there or cannot be read",
    RejectionReason.UNDECODABLE_IMAGE: "the image is damaged, or none at all",
    RejectionReason.IMAGE_TOO_LARGE: "the image has too many pixels, or is too long a strip",
    RejectionReason.TEMPLATE_REFUSED: "the model's chat template refuses the row",
    RejectionReason.PROCESSOR_REFUSED: "the model's processor refuses the row",
    RejectionReason.TOO_LONG: "more tokens than the model takes",
    RejectionReason.TOO_LARGE: "alone, it does not fit the memory of the device",
    RejectionReason.NON_FINITE: "the model's first layer gave infinity or NaN",
}


@dataclass(frozen=True, slots=True)
class GallerySample:
    """A sample that the report shows, as an `Overlay` needs it."""

    sample_key: str
    shard: str
    row: int
    text: str
    """The row's JSON text, verbatim."""
    images: tuple[str, ...]
    """Its images, relative to the image root."""
    image_sha256: tuple[str, ...]
    """Of the bytes that were embedded, likewise."""
    fingerprint: str
    """Of the model that it was embedded with."""


Overlay: TypeAlias = Callable[[GallerySample], bytes | None]
"""The picture of where the instruction's attention lies, in any format that images may have; none if there
is none."""


def provenance(selection: Selection, dataset: Mapping[str, Any]) -> str:
    """The hash of what the report is made from.

    Args:
        selection: The selection.
        dataset: The training dataset's manifest, or the versions in it: its provenance covers the settings,
            the selection and the basis, and with it the vectors, the rows and their images.
    """
    return lineage.provenance(
        NAME,
        CODE_VERSION,
        training_dataset=[dataset.get("provenance", ""), dataset.get("data_version", "")],
        additions=_labels_version(selection),
    )


def _labels_version(selection: Selection) -> str:
    """The version of the labels by which the report counts rows."""
    return digest(selection.source_label)


def _whole(receipt: dict[str, Any]) -> dict[str, Any]:
    if missing := {"data_version", "provenance", "bytes"} - set(receipt):
        raise ValueError(f"the receipt lacks {', '.join(sorted(missing))}")
    return receipt


_Receipt: TypeAlias = Annotated[dict[str, Any], AfterValidator(_whole)]


def read_receipt(artifacts: ArtifactStore) -> dict[str, Any]:
    """What the last report says of itself: ``data_version``, ``provenance`` and its size in ``bytes``.

    Raises:
        ArtifactMissingError: There is no report yet.
        ArtifactCorruptError: The receipt is damaged.
    """
    receipt: dict[str, Any] = artifacts.read_json(NAME, RECEIPT, shape=_Receipt)
    return receipt


def is_complete(artifacts: ArtifactStore) -> bool:
    """Whether the receipt is there and the page has the size that it states."""
    try:
        receipt = read_receipt(artifacts)
        size = page_path(artifacts).stat().st_size
    except (ArtifactMissingError, ArtifactCorruptError, FileNotFoundError):
        return False
    return bool(size == receipt["bytes"])


def page_path(artifacts: ArtifactStore) -> UPath:
    """Where the page lies, whether or not it exists."""
    return artifacts.path(NAME, PAGE, suffix=".html")


def build(selection: Selection) -> dg.AssetsDefinition:
    """The asset for one selection."""

    @dg.asset(
        **selection.asset_options(NAME, by_shard=False),
        deps=[
            selection.key(name)
            for name in (
                training_dataset.NAME,
                selected_subset.NAME,
                importance_scores.NAME,
                subspace_basis.NAME,
                attention_embeddings.NAME,
            )
        ],
        kinds={"html"},
        code_version=lineage.shown_code_version(CODE_VERSION, additions=_labels_version(selection)),
        metadata={"dagster/column_schema": column_schema(COMPOSITION)},
        check_specs=[
            dg.AssetCheckSpec(
                "report_counts_every_row",
                asset=selection.key(NAME),
                description="The report's counts by source add up to the manifest's.",
            ),
            dg.AssetCheckSpec(
                "gallery_pictures_open",
                asset=selection.key(NAME),
                description="Every picture that the report is to show can be opened.",
            ),
        ],
    )
    def selection_report(
        context: dg.AssetExecutionContext, storage: StorageResource, vlm: VlmResource
    ) -> dg.MaterializeResult:
        """The selection as one page to open in a browser: curves, composition, rejected rows, galleries."""
        from scalselect_assets.report.render import render

        with at_work(context, storage.locks(selection.store)):
            start = time.monotonic()
            artifacts = storage.artifacts(selection.store)
            manifest = training_dataset.read_manifest(artifacts)
            overlays = AttentionOverlays(selection, storage, vlm)
            churn = last_churn(context.instance, selection)
            content = gather(storage, selection, churn=churn, overlay=overlays.of)
            page = render(content)
            overlays.forget_others()
            n_bytes = artifacts.write_text(path := page_path(artifacts), [page])
            data_version = hashlib.sha256(page.encode()).hexdigest()
            made_from = provenance(selection, manifest)
            receipt = {**lineage.header(data_version, made_from), "bytes": n_bytes}
            artifacts.write_json(NAME, receipt, RECEIPT)
            return Output(
                data_version,
                made_from,
                {
                    "report": dg.MetadataValue.url(_link(path)),
                    **_numbers(content),
                    **_inline_plots(content),
                    "seconds": time.monotonic() - start,
                    "bytes": n_bytes,
                    "dagster/uri": str(path),
                },
                (_counts_check(content, manifest), _pictures_check(content)),
            ).result()

    return selection_report


@deferred()
def last_churn(instance: dg.DagsterInstance, selection: Selection) -> Churn | None:
    """What became of the selection before, as it was recorded when the present one was made; none if not."""
    event = instance.get_latest_materialization_event(selection.key(selected_subset.NAME))
    made = event.asset_materialization if event else None
    told_by_name = {name: value.value for name, value in made.metadata.items()} if made else {}
    if "churn" not in told_by_name:
        return None
    stayed, came, went = (int(str(told_by_name[name])) for name in ("stayed", "came", "went"))
    return Churn(stayed, came, went, float(str(told_by_name["churn"])))


def gather(
    storage: StorageResource,
    selection: Selection,
    *,
    churn: Churn | None = None,
    overlay: Overlay | None = None,
) -> ReportContent:
    """Everything that the report says of the present training dataset.

    Args:
        storage: Opens pool and store.
        selection: The selection.
        churn: Against the selection before, which the store does not keep.
        overlay: Gives the attention overlay of a sample; without it none is shown.

    Raises:
        ArtifactMissingError: Something is not materialized.
        dg.Failure: The stored results are not of one piece.
    """
    artifacts = storage.artifacts(selection.store)
    manifest = training_dataset.read_manifest(artifacts)
    subspace, basis = subspace_basis.read_basis(artifacts)
    subset, subset_header = artifacts.read_frame(
        selected_subset.NAME, columns=["shard", "row", "normalised_leverage"]
    )
    _require_one_piece(selection, manifest, subset_header, basis)
    shards = sorted(json.loads(basis["shards"]))
    scores = _Scores(artifacts, basis["data_version"], shards, subspace.n)
    profile, picks = scores.profile_and_picks(subset)
    rows = _Rows(storage, selection, subset, overlay, subspace.n)
    rows.read(shards, picks)
    return ReportContent(
        title=f"Selection report: {selection.name}",
        made_from=_made_from(manifest, subset_header),
        settings=_settings(selection, manifest),
        counts=Counts(manifest["rows"], subspace.n, sum(rows.rejected.values()), subset.height),
        energy=plots.energy_points(subspace, subspace_basis.rule_told(selection.rank_rule.describe())),
        leverage=profile,
        composition=rows.composition(),
        comparison=comparison.for_report(artifacts),
        churn=churn,
        rejected=tuple(
            RejectedReason(reason, n_rows, _MEANINGS[RejectionReason(reason)])
            for reason, n_rows in sorted(rows.rejected.items(), key=lambda one: (-one[1], one[0]))
        ),
        galleries=_galleries(picks, rows.items),
        **_shown_manifest(artifacts, manifest),
    )


def _require_one_piece(
    selection: Selection,
    manifest: Mapping[str, Any],
    subset_header: Mapping[str, str],
    basis: Mapping[str, str],
) -> None:
    """The dataset was written from the present selection and basis, under the present settings.

    Raises:
        dg.Failure: It was not.
    """
    expected = training_dataset.provenance(
        selection,
        subset_header["provenance"],
        subset_header["data_version"],
        basis["data_version"],
        manifest["shards_left_out"],
    )
    if manifest["provenance"] != expected:
        raise dg.Failure(
            f"the training dataset's provenance is {manifest['provenance']}; of the present selection, basis "
            f"and settings it would be {expected}: materialize {training_dataset.NAME} first, or run the "
            "refresh",
            allow_retries=False,
        )


class _Scores:
    """The scores of all shards, read shard by shard and never held."""

    _COLUMNS: Final = ("row", "sample_key", "leverage", "normalised_leverage")

    def __init__(self, artifacts: ArtifactStore, basis_version: str, shards: Sequence[str], n: int) -> None:
        """The ``n`` scores of ``shards``, which must be of the basis of that version."""
        self._artifacts, self._basis_version, self._shards, self._n = artifacts, basis_version, shards, n

    def profile_and_picks(self, subset: pl.DataFrame) -> tuple[LeverageProfile, pl.DataFrame]:
        """How leverage is spread, and the samples for the galleries.

        Args:
            subset: The selected samples: shard, row and normalised_leverage.

        Returns:
            The profile; and a frame of shard, row, sample_key, leverage, normalised_leverage, rank (by
            normalised leverage over the pool, ties by key and shard) and gallery, highest first.
        """
        from scalselect_assets.method.top_n import nth_largest

        # Half the samples have at least this much, the upper one of two where the pool is even.
        median = nth_largest(self._normalised, (self._n + 1) // 2).value
        pool, total = LeverageCounts(), 0.0
        best = dict.fromkeys(("highest", "median", "lowest"), self._none())
        for frame in self._frames(self._COLUMNS):
            pool.add(frame["normalised_leverage"].to_numpy())
            total += float(frame["normalised_leverage"].sum())
            best = {name: self._best(so_far, frame, name, median) for name, so_far in best.items()}
        chosen = LeverageCounts()
        normalised = subset["normalised_leverage"].to_numpy()
        chosen.add(normalised)
        picks = pl.concat(
            frame.drop("order").with_columns(gallery=pl.lit(name)) for name, frame in best.items()
        )
        # Of the last selected sample, only how many are above it counts.
        least = float(normalised.min()) if len(normalised) else 0.0
        above, ranks = self._counted_before(picks, least)
        picks = picks.with_columns(rank=pl.Series(ranks, dtype=pl.Int64)).sort("rank")
        scores = picks["normalised_leverage"]
        curve = dict(zip(*pool.rank_curve(), strict=True))
        if curve:
            curve |= {1: float(scores[0]), self._n: float(scores[-1])}  # the ends are known exactly
        profile = LeverageProfile(
            bins=pool.bins(chosen),
            ranks=tuple(sorted(rank for rank, value in curve.items() if value > 0)),
            values=tuple(value for _, value in sorted(curve.items()) if value > 0),
            cut=least if above < subset.height else None,
            leverage_share=float(normalised.sum()) / total if total else 0.0,
        )
        return profile, picks

    def _best(self, so_far: pl.DataFrame, frame: pl.DataFrame, gallery: str, median: float) -> pl.DataFrame:
        """The rows that a gallery shows, of those before and those of another shard."""
        score = pl.col("normalised_leverage")
        order = {"highest": -score, "median": (score - median).abs(), "lowest": score}[gallery]
        # The lowest are the last in the order of ranks, so their ties are broken the other way round.
        last = gallery == "lowest"
        more = frame.with_columns(order=order)
        if so_far.height == GALLERY_SIZE:
            more = more.filter(pl.col("order") <= so_far["order"][-1])
        return (
            pl.concat([so_far, more])
            .sort(["order", "sample_key", "shard"], descending=[False, last, last])
            .head(GALLERY_SIZE)
        )

    def _counted_before(self, picks: pl.DataFrame, least: float) -> tuple[int, list[int]]:
        """How many samples of the pool are above ``least``, and the rank of each of ``picks``."""
        wanted = list(picks.select("normalised_leverage", "sample_key", "shard").iter_rows())
        values = np.unique(picks["normalised_leverage"].to_numpy())
        above, ranks = 0, [1] * len(wanted)
        for shard in self._shards:
            score = self._read(shard, ("normalised_leverage",))["normalised_leverage"].to_numpy()
            above += int(np.count_nonzero(score > least))
            larger = {value: int(np.count_nonzero(score > value)) for value in values.tolist()}
            # Keys, the widest column, are needed of the rows only that have the score of one of the picks.
            tied: list[tuple[float, str]] = []
            if np.isin(score, values).any():
                frame = self._read(shard, ("normalised_leverage", "sample_key"))
                tied = frame.select("normalised_leverage", "sample_key").filter(np.isin(score, values)).rows()
            for place, (value, key, of_shard) in enumerate(wanted):
                ranks[place] += larger[value] + sum(
                    other == value and (other_key, shard) < (key, of_shard) for other, other_key in tied
                )
        return above, ranks

    def _normalised(self) -> Iterator[NDArray[np.float64]]:
        for frame in self._frames(("normalised_leverage",)):
            yield frame["normalised_leverage"].to_numpy()

    def _frames(self, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        return (self._read(shard, columns) for shard in self._shards)

    def _read(self, shard: str, columns: Sequence[str]) -> pl.DataFrame:
        frame = importance_scores.read_scores(self._artifacts, self._basis_version, shard, list(columns))
        return frame.select(pl.lit(shard).alias("shard"), *columns)

    @staticmethod
    def _none() -> pl.DataFrame:
        return pl.DataFrame(
            schema={
                "shard": pl.String,
                "row": pl.Int64,
                "sample_key": pl.String,
                "leverage": pl.Float64,
                "normalised_leverage": pl.Float64,
                "order": pl.Float64,
            }
        )


class _Rows:
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
        self._images = storage.samples(selection.source, selection.image_root, selection.store)
        self._source_of, self._overlay_of, self._n = source_of(selection.source_label), overlay, n
        self._chosen = {str(shard): rows["row"] for (shard,), rows in subset.group_by("shard")}
        self._pool, self._embedded, self._selected = Counter[str](), Counter[str](), Counter[str]()
        self.rejected = Counter[str]()
        self.items: dict[tuple[str, int], GalleryItem] = {}

    def read(self, shards: Sequence[str], picks: pl.DataFrame) -> None:
        """Go through all rows once.

        Args:
            shards: Of the basis.
            picks: The samples for the galleries, as `_Scores` gives them.
        """
        wanted = {str(shard): rows for (shard,), rows in picks.group_by("shard")}
        for shard in shards:
            table, header = attention_embeddings.recorded_table(self._artifacts, shard)
            columns = ["text", *(["images", "image_sha256"] if shard in wanted else [])]
            chosen = self._chosen.get(shard, pl.Series(dtype=pl.Int64))
            rows = pl.DataFrame(self._embeddings.read_rows(table, columns)).with_columns(
                is_selected=pl.col("row").is_in(chosen.implode())
            )
            sources = self._labels(shard, rows)
            self._embedded.update(sources)
            self._selected.update(compress(sources, rows["is_selected"]))
            rejected = attention_embeddings.read_rejected(
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
    from scalselect_assets.method.images import ImageTooLargeError, UndecodableImageError
    from scalselect_assets.report.pictures import thumbnail

    try:
        return thumbnail(data, alt)
    except (UndecodableImageError, ImageTooLargeError) as error:
        return Picture(alt, problem=str(error))


def _galleries(picks: pl.DataFrame, items: Mapping[tuple[str, int], GalleryItem]) -> tuple[Gallery, ...]:
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


def _made_from(manifest: Mapping[str, Any], subset_header: Mapping[str, str]) -> tuple[Fact, ...]:
    """Versions, from the code to the file that a trainer reads."""
    model = manifest["model"]
    facts = {
        "scalselect-dagster": manifest["code"]["scalselect-dagster"],
        "model": model["model"],
        "model commit": model.get("commit"),
        "model fingerprint": model["fingerprint"],
        "basis version": manifest["basis_version"],
        "subset version": subset_header["data_version"],
        "dataset SHA-256": manifest["data_version"],
        "dataset provenance": manifest["provenance"],
        "report code version": CODE_VERSION,
    }
    return tuple(Fact(name, str(value)) for name, value in facts.items() if value is not None)


def _settings(selection: Selection, manifest: Mapping[str, Any]) -> tuple[Fact, ...]:
    """What was asked for, and which shards could not be served."""
    settings = {
        name.replace("_", " "): "default" if value is None else str(value)
        for name, value in selection.result_settings().items()
    }
    if left_out := manifest["shards_left_out"]:
        named = ", ".join(left_out[:10]) + (" …" if len(left_out) > 10 else "")
        settings["shards left out"] = f"{len(left_out):,}: {named}"
    return tuple(Fact(name, value) for name, value in settings.items())


def _shown_manifest(artifacts: ArtifactStore, manifest: Mapping[str, Any]) -> dict[str, str]:
    """The manifest for the page, with the lineage of the first shards only."""
    shards, left_out = manifest["shards"], manifest["shards_left_out"]
    shown = {
        **manifest,
        "shards": dict(list(shards.items())[:_MANIFEST_SHARDS]),
        "shards_left_out": left_out[:_MANIFEST_SHARDS],
    }
    path = artifacts.path(training_dataset.NAME, training_dataset.MANIFEST, suffix=".json")
    note = f"The file is {path}."
    if max(len(shards), len(left_out)) > _MANIFEST_SHARDS:
        note = f"Only the first {_MANIFEST_SHARDS} shards are shown; all {len(shards):,} are in {path}."
    return {"manifest": json.dumps(shown, ensure_ascii=False, indent=1), "manifest_note": note}


def _link(path: UPath) -> str:
    """A URL that a browser opens."""
    return Path(path.path).as_uri() if is_local(path) else str(path)


def _numbers(content: ReportContent) -> dict[str, Any]:
    """What people watch over time, as plain numbers, which the UI plots."""
    counts, churn = content.counts, content.churn
    return {
        "rank": content.energy.k,
        "energy": content.energy.k_energy,
        "rows": counts.rows,
        "embedded": counts.embedded,
        "selected": counts.selected,
        "rejected": counts.rejected,
        "leverage_share": content.leverage.leverage_share,
        "sources": len(content.composition),
        **(
            {"churn": churn.share, "stayed": churn.stayed, "came": churn.came, "went": churn.went}
            if churn
            else {}
        ),
    }


def _inline_plots(content: ReportContent) -> dict[str, Any]:
    """The key plots, for the UI."""
    leverage, selected = content.leverage, content.counts.selected
    drawn = {"energy_curve": plots.energy_picture(content.energy)}
    if any(one.low for one in leverage.bins):
        drawn["leverage_distribution"] = plots.picture(
            charts.leverage_chart(leverage), told.leverage(leverage, selected)
        )
    if leverage.ranks:
        drawn["rank_curve"] = plots.picture(charts.rank_chart(leverage, selected), told.ranks(leverage))
    composition = [
        dg.TableRecord(
            {"source": one.source, "pool": one.pool, "embedded": one.embedded, "selected": one.selected}
        )
        for one in content.composition
    ]
    return {
        **drawn,
        "composition": dg.MetadataValue.table(composition, schema=column_schema(COMPOSITION)),
        "rejected_by_reason": {one.reason: one.rows for one in content.rejected},
    }


def _counts_check(content: ReportContent, manifest: Mapping[str, Any]) -> dg.AssetCheckResult:
    shown = {
        name: sum(getattr(one, attribute) for one in content.composition)
        for name, attribute in (("rows", "pool"), ("embedded", "embedded"), ("selected", "selected"))
    }
    expected = {name: manifest[name] for name in shown}
    rejected = {one.reason: one.rows for one in content.rejected}
    return dg.AssetCheckResult(
        check_name="report_counts_every_row",
        passed=shown == expected and rejected == manifest["rejected"],
        metadata={"report": shown, "manifest": expected},
    )


def _pictures_check(content: ReportContent) -> dg.AssetCheckResult:
    pictures = [
        (item.place, one)
        for gallery in content.galleries
        for item in gallery.items
        for one in (*item.pictures, *([item.overlay] if item.overlay else []))
    ]
    problems = {place: one.problem for place, one in pictures if one.problem}
    return dg.AssetCheckResult(
        check_name="gallery_pictures_open",
        passed=not problems,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"pictures": len(pictures), "missing": len(problems), "problems": problems},
    )
