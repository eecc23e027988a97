"""Beside the path, by shard: the samples that an evaluation set holds already, and must not be trained on.

Holds: one row per contaminated sample with the evaluation image or text that it repeats. Decides from the
raw samples, before anything is embedded, so that it does not depend on a model. An image matches by its bytes
or by its perceptual hash (`image_hashes`), a text by its n-grams (`text_overlap`). Costs: images are read and
decoded once (1 to 3 ms each), then remembered; texts are compared each time, about a millisecond for 100
words; memory of the evaluation set and one shard.

The evaluation set's version is the hash of its files' names and bytes. It is part of the provenance, so that
a file that is added or changed makes every shard's list stale, and nothing else of it does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import dagster as dg
import numpy as np
import polars as pl
from numpy.typing import NDArray

from scalselect_assets.choice import image_hashes
from scalselect_assets.choice.text_overlap import NgramIndex, TextMatch
from scalselect_assets.declaration.curation import Decontamination
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.method.representation.conversation import Conversation
from scalselect_assets.method.representation.images import ImageTooLargeError, UndecodableImageError
from scalselect_assets.method.representation.rejection import RejectionReason
from scalselect_assets.pool import raw_samples
from scalselect_assets.recording import data_versions
from scalselect_assets.recording.columns import RAW_SAMPLES, Column, Table, polars_schema
from scalselect_assets.resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from scalselect_assets.resources.evaluation_set import (
    EvaluationFile,
    EvaluationKind,
    EvaluationSetError,
    FileDigests,
    files,
    passed_over,
    read_texts,
    sha256_of,
)
from scalselect_assets.resources.identity import digest
from scalselect_assets.resources.samples import written_turns
from scalselect_assets.resources.storage import StorageResource

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
    """The evaluation set.

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


def provenance(settings: Decontamination, raw_version: str, evaluation_version: str) -> str:
    """The hash of what the list of one shard is computed from."""
    return data_versions.provenance(
        NAME,
        CODE_VERSION,
        hashes=image_hashes.KIND,
        settings=settings.matching(),
        evaluation_set=evaluation_version,
        raw_samples=raw_version,
    )


@dataclass(frozen=True, slots=True)
class Looked:
    """The contaminated samples of some shards.

    Attributes:
        frame: A frame of `DECONTAMINATION` with the shard, by shard and row.
        numbers: Numbers of the evaluation set and of the work.
        whole_shards: Shards of which every sample is contaminated.
    """

    frame: pl.DataFrame
    numbers: Mapping[str, str | int]
    whole_shards: tuple[str, ...]


def look(
    storage: StorageResource, selection: Selection, evaluation: EvaluationSet, shards: Sequence[str]
) -> Looked:
    """Look through shards; those that were looked through before, as they are, are not read again.

    Raises:
        ArtifactMissingError: A shard's raw samples are not there.
    """
    settings = selection.decontamination
    frames = [pl.DataFrame(schema={"shard": pl.String(), **polars_schema(DECONTAMINATION)})]
    if settings is None:
        return Looked(frames[0], {}, ())
    artifacts = storage.artifacts(selection.store)
    source = selection.open_pool(storage)
    whole: list[str] = []
    n_decoded = n_shards = 0
    for shard in shards:
        raw_version = artifacts.read_header(raw_samples.NAME, shard)["data_version"]
        made_from = provenance(settings, raw_version, evaluation.version)
        known = _known(artifacts, shard, made_from)
        if known is None:
            candidates = trainable(artifacts.read_frame(raw_samples.NAME, shard)[0])
            hashes = pl.DataFrame(schema=polars_schema(image_hashes.HASHES))
            if evaluation.images is not None:
                named = candidates["images"].explode().drop_nulls().to_list()
                hashes, decoded = image_hashes.shard_hashes(
                    artifacts, shard, raw_version, named, source.open_image
                )
                n_decoded += decoded
            n_shards += 1
            known = contaminated(candidates, hashes, evaluation, settings), candidates.height
            artifacts.write_frame(
                NAME, known[0], {"provenance": made_from, "looked_at": str(candidates.height)}, shard
            )
        frame, n_candidates = known
        if n_candidates and frame.height == n_candidates:
            whole.append(shard)
        frames.append(frame.select(pl.lit(shard).alias("shard"), *polars_schema(DECONTAMINATION).names()))
    numbers = {"shards_looked_through": n_shards, "images_decoded": n_decoded, **_numbers(evaluation)}
    return Looked(pl.concat(frames), numbers, tuple(whole))


def _known(artifacts: ArtifactStore, shard: str, made_from: str) -> tuple[pl.DataFrame, int] | None:
    """The earlier findings in a shard and its number of samples, where they still hold."""
    try:
        if artifacts.read_header(NAME, shard).get("provenance") != made_from:
            return None
        frame, header = artifacts.read_frame(NAME, shard)
    except (ArtifactMissingError, ArtifactCorruptError):
        return None
    return frame, int(header["looked_at"])


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
        evaluation: The evaluation set.
        settings: The likeness that counts as a match.

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
    return "\n".join(said for _, said in written_turns(text))


def evaluation_of(storage: StorageResource, selection: Selection) -> EvaluationSet:
    """The evaluation set; an empty one where none is declared.

    Raises:
        dg.Failure: It cannot be used; not retried, since only other files help.
    """
    if selection.decontamination is None:
        return EvaluationSet("", None, None)
    try:
        return read_evaluation_set(storage, selection.store, selection.decontamination)
    except EvaluationSetError as error:
        raise dg.Failure(str(error), allow_retries=False) from error


def version_of(storage: StorageResource, selection: Selection) -> str:
    """The version of a selection's evaluation set, empty where it has none; raises as ``evaluation_of``."""
    if selection.decontamination is None:
        return ""
    try:
        return evaluation_version(storage, selection.store, selection.decontamination)
    except EvaluationSetError as error:
        raise dg.Failure(str(error), allow_retries=False) from error


def _numbers(evaluation: EvaluationSet) -> dict[str, str | int]:
    """Numbers of the evaluation set: the entries that were used, and those that could not be."""
    numbers: dict[str, str | int] = {"evaluation_set": evaluation.version}
    if evaluation.images is not None:
        numbers["evaluation_images"] = len(evaluation.images.names)
        numbers["evaluation_images_by_bytes_only"] = len(evaluation.images.names) - len(
            evaluation.images.hashed
        )
    if evaluation.texts is not None:
        numbers["evaluation_texts"] = evaluation.texts.n_texts
        numbers["evaluation_texts_too_short"] = evaluation.texts.n_too_short
        numbers["evaluation_texts_common"] = evaluation.texts.n_common
    return numbers


def list_files(storage: StorageResource, selection: Selection) -> None:
    """List the declared evaluation set, whose bytes are not read.

    Raises:
        EvaluationSetError: It is not there, or holds nothing of its kind.
    """
    if selection.decontamination is not None:
        for kind, place in _declared_places(selection.decontamination):
            files(storage.path(place), kind)


def _declared_places(settings: Decontamination) -> Iterator[tuple[EvaluationKind, str]]:
    """The folders or files that are declared, with what is to be in them."""
    if settings.images is not None:
        yield "images", settings.images
    if settings.texts is not None:
        yield "texts", settings.texts


def files_passed_over(storage: StorageResource, selection: Selection) -> dict[str, Any]:
    """The files of the declared evaluation folders that are not read, by kind, with count and examples."""
    settings = selection.decontamination
    if settings is None:
        return {}
    return {
        f"{part}: {kind}": found
        for part, place in _declared_places(settings)
        for kind, found in passed_over(storage.path(place), part).items()
    }


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
