"""Beside the path, by shard: the samples that an evaluation set holds already, and must not be trained on.

Holds: one row per contaminated sample with the evaluation image or text that it repeats. Decides from the
raw samples, before anything is embedded, so that it does not depend on a model. An image matches by its bytes
or by its perceptual hash (`image_hashes`), a text by its n-grams (`text_overlap`). Costs: images are read and
decoded once (1 to 3 ms each), then remembered; texts are compared each time, about a millisecond for 100
words; memory of the evaluation set and one shard.

The evaluation set's version is the hash of its files' names and bytes. It is part of the provenance, so that
a file that is added or changed makes every shard's list stale, and nothing else of it does.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import dagster as dg
import numpy as np
import polars as pl
from numpy.typing import NDArray

from resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from resources.evaluation_set import (
    EvaluationFile,
    EvaluationSetError,
    FileDigests,
    files,
    read_texts,
    sha256_of,
)
from resources.identity import digest
from resources.storage import StorageResource
from scalselect_assets import image_hashes, lineage, raw_samples
from scalselect_assets.curation import Decontamination
from scalselect_assets.materialization import Output, materialize_shards
from scalselect_assets.method.conversation import Conversation
from scalselect_assets.method.images import ImageTooLargeError, UndecodableImageError
from scalselect_assets.method.rejection import RejectionReason
from scalselect_assets.partitions import shard_check
from scalselect_assets.selection import Selection
from scalselect_assets.tables import RAW_SAMPLES, Column, Table, column_schema, polars_schema
from scalselect_assets.text_overlap import NgramIndex, TextMatch

NAME: Final = "decontamination"
CODE_VERSION: Final = "1"
EVALUATION_IMAGE: Final = "evaluation_image"
EVALUATION_TEXT: Final = "evaluation_text"

_EVALUATION_FILES: Final = "evaluation_files"
_EVALUATION_HASHES: Final = "evaluation_hashes"
_SHOWN: Final = 80  # characters of an evaluation text in a partner's name

DECONTAMINATION: Table = {
    "row": RAW_SAMPLES["row"],
    "sample_key": RAW_SAMPLES["sample_key"],
    "source_id": RAW_SAMPLES["source_id"],
    "reason": Column(pl.String(), "evaluation_image or evaluation_text; the image where both match."),
    "partner": Column(
        pl.String(), "The evaluation file that it repeats; of a text, with line and beginning."
    ),
    "distance": Column(
        pl.Int64(), "Bits in which the perceptual hashes differ, 0 for the same bytes; null for texts."
    ),
    "overlap": Column(
        pl.Float64(), "Share of the evaluation text's n-grams that the sample has; null for images."
    ),
    "detail": Column(pl.String(), "What was found, and what else matches."),
}


@dataclass(frozen=True, slots=True)
class EvaluationImages:
    """The images that are looked for.

    Attributes:
        names: File of each content, by the SHA-256 of its bytes; the first of equals.
        hashed: Files that have a perceptual hash.
        hashes: (m,) uint64, of ``hashed``.
    """

    names: Mapping[str, str]
    hashed: Sequence[str]
    hashes: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """What is looked for.

    Attributes:
        version: Hash of the files' names and bytes.
        images: None where none are declared.
        texts: None where none are declared.
    """

    version: str
    images: EvaluationImages | None
    texts: NgramIndex | None


def evaluation_version(storage: StorageResource, store: str, settings: Decontamination) -> str:
    """The version of the evaluation set as it is now; reads only files that are new or changed.

    Raises:
        EvaluationSetError: A declared place does not exist or holds nothing of its kind.
    """
    return _version(*_found(storage, storage.artifacts(store), settings))


def read_evaluation_set(storage: StorageResource, store: str, settings: Decontamination) -> EvaluationSet:
    """The evaluation set, hashed and indexed; hashes of images are remembered in the store.

    Raises:
        EvaluationSetError: As ``evaluation_version``, or a file cannot be read as what it is, or no text can
            be looked for.
    """
    artifacts = storage.artifacts(store)
    images, texts, digests = _found(storage, artifacts, settings)
    return EvaluationSet(
        _version(images, texts, digests),
        None if settings.images is None else _evaluation_images(artifacts, images, digests),
        None if settings.texts is None else _evaluation_texts(texts, settings),
    )


def provenance(settings: Decontamination | None, raw_version: str, evaluation_version: str) -> str:
    """What the list of one shard is computed from; without settings, nothing is looked for."""
    return lineage.provenance(
        NAME,
        CODE_VERSION,
        hashes=image_hashes.KIND,
        settings=None if settings is None else settings.matching(),
        evaluation_set=evaluation_version,
        raw_samples=raw_version,
    )


def build(selection: Selection) -> dg.AssetsDefinition:
    """The asset for one selection."""
    settings: Decontamination | None = selection.decontamination  # type: ignore[attr-defined, unused-ignore]

    @dg.asset(
        **selection.asset_options(NAME, by_shard=True),
        deps=[selection.key(raw_samples.NAME)],
        kinds={"polars", "parquet"},
        code_version=lineage.shown_code_version(
            CODE_VERSION, settings=None if settings is None else settings.model_dump()
        ),
        metadata={"dagster/column_schema": column_schema(DECONTAMINATION)},
        check_specs=[
            shard_check(
                selection.partitions,
                selection.key(NAME),
                "some_rows_are_uncontaminated",
                "The shard is no copy of the evaluation set, as one whose rows all match it is.",
            )
        ],
    )
    def decontamination(context: dg.AssetExecutionContext, storage: StorageResource) -> dg.MaterializeResult:
        """The samples that repeat an image or a text of the evaluation set, each with what it repeats."""
        artifacts = storage.artifacts(selection.store)
        source = storage.samples(selection.source, selection.image_root, selection.store)
        evaluation = _evaluation_of(storage, selection, settings)

        def look(shard: str) -> Output:
            start = time.monotonic()
            raw, raw_header = artifacts.read_frame(raw_samples.NAME, shard)
            candidates = trainable(raw)
            hashes, n_decoded = pl.DataFrame(schema=polars_schema(image_hashes.HASHES)), 0
            if settings is not None and evaluation.images is not None:
                named = candidates["images"].explode().drop_nulls().to_list()
                hashes, n_decoded = image_hashes.shard_hashes(
                    artifacts, shard, raw_header["data_version"], named, source.open_image
                )
            frame = pl.DataFrame(schema=polars_schema(DECONTAMINATION))
            if settings is not None:
                frame = contaminated(candidates, hashes, evaluation, settings)
            data_version = digest(
                raw_header["data_version"], hashlib.sha256(frame.write_ndjson().encode()).hexdigest()
            )
            made_from = provenance(settings, raw_header["data_version"], evaluation.version)
            header = lineage.header(
                data_version,
                made_from,
                raw_samples=raw_header["data_version"],
                evaluation_set=evaluation.version,
            )
            path, size = artifacts.write_frame(NAME, frame, header, shard)
            return Output(
                data_version,
                made_from,
                {
                    "dagster/partition_row_count": frame.height,
                    "looked_at": candidates.height,
                    "contaminated": raw_samples.reason_counts(frame),
                    "images": hashes.height,
                    "images_decoded": n_decoded,
                    "images_not_opened": hashes["image_sha256"].null_count(),
                    **_told(evaluation),
                    "seconds": time.monotonic() - start,
                    "bytes": size,
                    "dagster/uri": str(path),
                },
                (_remaining(candidates, frame),),
            )

        return materialize_shards(context, storage.locks(selection.store), look, work=NAME)

    return decontamination


def trainable(raw: pl.DataFrame) -> pl.DataFrame:
    """The raw samples that may come to be trained on: the accepted ones, and those without an image.

    The latter are rejected for having no vector, but a selection may keep them.
    """
    return raw.filter(pl.col("reason").is_null() | (pl.col("reason") == RejectionReason.TEXT_ONLY.value))


def contaminated(
    raw: pl.DataFrame, hashes: pl.DataFrame, evaluation: EvaluationSet, settings: Decontamination
) -> pl.DataFrame:
    """The rows that repeat something of the evaluation set.

    Where an image matches, it is the reason, and a text that matches, too, stands in the detail. Of several
    images of a row, the nearest counts, the first of equals. An image that cannot be opened or decoded
    matches nothing (its row is rejected elsewhere); a damaged one is still compared by its bytes.

    Args:
        raw: A frame of `RAW_SAMPLES`; rejected rows without a conversation are compared by their turns' text.
        hashes: A frame of `image_hashes.HASHES` with the images of these rows; may be empty where the
            evaluation set has none.
        evaluation: What is looked for.
        settings: How alike it has to be.

    Returns:
        A frame of `DECONTAMINATION`, one row per contaminated sample, in row order.
    """
    by_image = (
        {} if evaluation.images is None else _matching_images(hashes, evaluation.images, settings.max_hamming)
    )
    records: list[tuple[object, ...]] = []
    columns = ("row", "sample_key", "source_id", "images", "conversation", "text")
    for row, key, source_id, images, conversation, text in raw.select(columns).sort("row").iter_rows():
        found = min(
            ((by_image[image], image) for image in images or () if image in by_image),
            key=lambda one: one[0].distance,
            default=None,
        )
        repeated = None
        if evaluation.texts is not None:
            repeated = evaluation.texts.match(_said(conversation, text), settings.min_overlap)
        if found is not None:
            match, image = found
            also = f"; its text repeats {_partner(repeated)}, too" if repeated else ""
            detail = f"image {image} {match.how}{also}"
            records.append(
                (row, key, source_id, EVALUATION_IMAGE, match.partner, match.distance, None, detail)
            )
        elif repeated is not None:
            detail = f"both have {repeated.phrase!r}"
            records.append(
                (row, key, source_id, EVALUATION_TEXT, _partner(repeated), None, repeated.overlap, detail)
            )
    return pl.DataFrame(records, schema=polars_schema(DECONTAMINATION), orient="row")


@dataclass(frozen=True, slots=True)
class _ImageMatch:
    partner: str
    distance: int
    how: str


def _matching_images(
    hashes: pl.DataFrame, images: EvaluationImages, max_hamming: int | None
) -> dict[str, _ImageMatch]:
    """The images that an evaluation image matches, by path."""
    found: dict[str, _ImageMatch] = {}
    rest: list[tuple[str, int]] = []
    for image, sha256, phash in hashes.select("image", "image_sha256", "phash").iter_rows():
        if sha256 in images.names:
            found[image] = _ImageMatch(images.names[sha256], 0, "has the same bytes")
        elif phash is not None:
            rest.append((image, phash))
    if max_hamming is None or not rest or not images.hashed:
        return found
    places, distances = image_hashes.nearest(np.array([phash for _, phash in rest], np.uint64), images.hashes)
    for (image, _), place, distance in zip(rest, places.tolist(), distances.tolist(), strict=True):
        if distance <= max_hamming:
            how = f"looks the same: {distance} of 64 bits differ, at most {max_hamming} may"
            found[image] = _ImageMatch(images.hashed[place], distance, how)
    return found


def _partner(match: TextMatch) -> str:
    text = match.text.text
    head = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    return f"{match.text.file}, line {match.text.line}: {head}"


def _said(conversation: str | None, text: str) -> str:
    """All that a sample says, in order."""
    if conversation is not None:
        return "\n".join(Conversation.from_json(conversation).texts("system", "user", "assistant"))
    # A row without an image has no conversation; its layout was read and found right.
    value = json.loads(text)
    turns = value.get("messages") or value.get("conversations") or ()
    said = [turn.get("content") or turn.get("value") or "" for turn in turns]
    return "\n".join([value.get("system") or "", *said])


def _evaluation_of(
    storage: StorageResource, selection: Selection, settings: Decontamination | None
) -> EvaluationSet:
    """The evaluation set; an empty one where none is declared.

    Raises:
        dg.Failure: It cannot be used; not retried, since only other files help.
    """
    if settings is None:
        return EvaluationSet("", None, None)
    try:
        return read_evaluation_set(storage, selection.store, settings)
    except EvaluationSetError as error:
        raise dg.Failure(str(error), allow_retries=False) from error


def _told(evaluation: EvaluationSet) -> dict[str, str | int]:
    """What of the evaluation set was looked for, and what could not be."""
    told: dict[str, str | int] = {"evaluation_set": evaluation.version}
    if evaluation.images is not None:
        told["evaluation_images"] = len(evaluation.images.names)
        told["evaluation_images_by_bytes_only"] = len(evaluation.images.names) - len(evaluation.images.hashed)
    if evaluation.texts is not None:
        told["evaluation_texts"] = evaluation.texts.n_texts
        told["evaluation_texts_too_short"] = evaluation.texts.n_too_short
        told["evaluation_texts_common"] = evaluation.texts.n_common
    return told


def _found(
    storage: StorageResource, artifacts: ArtifactStore, settings: Decontamination
) -> tuple[list[EvaluationFile], list[EvaluationFile], FileDigests]:
    """The evaluation images, the files of texts, and the digests of both."""
    images = [] if settings.images is None else files(storage.path(settings.images), "images")
    texts = [] if settings.texts is None else files(storage.path(settings.texts), "texts")
    try:
        known: FileDigests = artifacts.read_json(_EVALUATION_FILES, shape=FileDigests)
    except (ArtifactMissingError, ArtifactCorruptError):
        known = {}
    digests = sha256_of([*images, *texts], known)
    if digests != known:
        artifacts.write_json(_EVALUATION_FILES, digests, durable=False)
    return images, texts, digests


def _version(images: Sequence[EvaluationFile], texts: Sequence[EvaluationFile], digests: FileDigests) -> str:
    parts = [[(file.name, digests[str(file.path)][2]) for file in found] for found in (images, texts)]
    return digest(NAME, *parts)


def _evaluation_images(
    artifacts: ArtifactStore, images: Sequence[EvaluationFile], digests: FileDigests
) -> EvaluationImages:
    names: dict[str, EvaluationFile] = {}
    for file in images:
        names.setdefault(digests[str(file.path)][2], file)
    remembered = image_hashes.read_hashes(artifacts, _EVALUATION_HASHES)
    known = {} if remembered is None else image_hashes.hashes_by_content(remembered[0])
    hashes = {
        sha256: known[sha256] if sha256 in known else _evaluation_hash(file) for sha256, file in names.items()
    }
    if hashes != known:
        records = [(names[sha256].name, sha256, phash) for sha256, phash in hashes.items()]
        frame = pl.DataFrame(records, schema=polars_schema(image_hashes.HASHES), orient="row")
        artifacts.write_frame(_EVALUATION_HASHES, frame, {"kind": image_hashes.KIND})
    hashed = [(names[sha256].name, phash) for sha256, phash in hashes.items() if phash is not None]
    return EvaluationImages(
        {sha256: file.name for sha256, file in names.items()},
        [name for name, _ in hashed],
        np.array([phash for _, phash in hashed], np.uint64),
    )


def _evaluation_hash(file: EvaluationFile) -> int | None:
    try:
        return image_hashes.perceptual_hash(file.path.read_bytes())
    except (UndecodableImageError, ImageTooLargeError) as error:
        raise EvaluationSetError(
            f"The evaluation image {file.path} cannot be decoded: {error}. Replace or remove it."
        ) from error


def _evaluation_texts(texts: Sequence[EvaluationFile], settings: Decontamination) -> NgramIndex:
    index = NgramIndex(
        list(read_texts(texts, settings.text_field)),
        ngram=settings.ngram,
        short_ngram=settings.short_ngram,
        common=settings.common_ngrams,
    )
    if index.n_texts == 0:
        raise EvaluationSetError(
            f"No text of {settings.texts} can be looked for: {index.n_too_short} have fewer than "
            f"{settings.short_ngram} words and {index.n_common} share all their n-grams with more than "
            f"{settings.common_ngrams} others. Lower short_ngram, raise common_ngrams, or leave texts out."
        )
    return index


def _remaining(candidates: pl.DataFrame, frame: pl.DataFrame) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name="some_rows_are_uncontaminated",
        passed=frame.height < candidates.height or candidates.height == 0,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"looked_at": candidates.height, "contaminated": frame.height},
    )
