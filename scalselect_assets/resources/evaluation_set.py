"""The evaluation set of a model: a folder of images, and texts with one text per line.

Evaluation files belong to the deployment, so here, unlike in the pool, nothing is forgiven. A file that
cannot be read is an error that names it: if a benchmark were silently skipped, the pool would look clean.
Costs: `files` asks for sizes and times only; bytes are read only if they are new (`sha256_of`).
"""

import hashlib
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from upath import UPath

from scalselect_assets.resources.files import file_state, is_local
from scalselect_assets.resources.pool_listing import (
    DEFAULT_IGNORE,
    PoolListing,
    entries_of,
    is_ignored,
    suffixes_of,
)
from scalselect_assets.resources.row_images import IMAGE_SUFFIXES as ROW_IMAGE_SUFFIXES
from scalselect_assets.resources.written_json import shorten

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
TEXT_SUFFIXES = (".jsonl", ".txt")

EvaluationKind: TypeAlias = Literal["images", "texts"]
_WANTED: Mapping[EvaluationKind, tuple[str, ...]] = {"images": IMAGE_SUFFIXES, "texts": TEXT_SUFFIXES}

FileDigests: TypeAlias = dict[str, tuple[int, str, str]]
"""Size, time or ETag, and SHA-256 of files, by their full path."""


class EvaluationSetError(ValueError):
    """The evaluation set cannot be used; the message names file and line and says what to do."""


@dataclass(frozen=True, slots=True)
class EvaluationFile:
    """One file of the evaluation set.

    Attributes:
        name: Path relative to the declared folder; the file's own name where a file was declared.
        path: Location of the file.
    """

    name: str
    path: UPath


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """One text that a model is measured with.

    Attributes:
        file: Name of the text's file.
        line: Line number in the file, from 1.
        text: The line as written, or the value of the field in a JSON Lines file.
    """

    file: str
    line: int
    text: str


def files(place: UPath, kind: EvaluationKind) -> list[EvaluationFile]:
    """The files of one kind in a folder and the folders below it, by name, or the one file that is given.

    Hidden files and files of other kinds are passed over: benchmarks come with licences and annotations.
    ``passed_over`` counts those that the user may have meant.

    Raises:
        EvaluationSetError: The place does not exist, holds no file of that kind, or is a file of another.
    """
    suffixes = _WANTED[kind]
    if not is_local(place):
        place.fs.invalidate_cache()
    if place.is_file():
        if not place.name.lower().endswith(suffixes):
            raise EvaluationSetError(
                f"Got {place} for evaluation {kind}; allowed are {', '.join(suffixes)} and folders of such "
                "files."
            )
        return [EvaluationFile(place.name, place)]
    if not place.is_dir():
        raise EvaluationSetError(
            f"Got {place} for evaluation {kind}, which does not exist. Correct the path, or mount the file "
            "system that holds it."
        )
    found = [
        EvaluationFile(_relative(path, place), path)
        for path in place.rglob("*")
        if path.name.lower().endswith(suffixes) and not _is_hidden(path, place) and path.is_file()
    ]
    if not found:
        raise EvaluationSetError(
            f"Got the folder {place} for evaluation {kind}, which holds none: no file ends in "
            f"{', '.join(suffixes)}. Name the folder that holds them, or leave the setting out."
        )
    return sorted(found, key=lambda file: file.name)


def passed_over(place: UPath, kind: EvaluationKind) -> dict[str, Any]:
    """The files of an evaluation folder that are not read, by kind, with count and examples.

    Annotations beside images and images beside texts are no part of that kind, and are not counted.

    Raises:
        OSError: A folder cannot be listed.
    """
    listing = PoolListing()
    if not place.is_file():
        _note_passed_over(place, "", kind, listing)
    return {kind: found for kind, found in listing.to_json().items() if kind != "ignored"}


def _note_passed_over(folder: UPath, below: str, kind: EvaluationKind, listing: PoolListing) -> None:
    for entry in entries_of(folder):
        path = f"{below}{entry.name}"
        is_image = entry.name.lower().endswith(ROW_IMAGE_SUFFIXES)
        if is_ignored(entry.name, path, DEFAULT_IGNORE):
            continue
        if entry.name.startswith("."):
            listing.pass_over("hidden", path)
        elif entry.kind == "folder":
            _note_passed_over(folder / entry.name, f"{path}/", kind, listing)
        elif entry.kind != "file":
            listing.pass_over(entry.kind, path)
        elif not entry.name.lower().endswith(_WANTED[kind]) and is_image == (kind == "images"):
            listing.pass_over(f"other:{suffixes_of(entry.name)}", path)


def sha256_of(found: Sequence[EvaluationFile], known: FileDigests) -> FileDigests:
    """The digests of files. Only files whose size or time differs from ``known`` are read.

    Raises:
        OSError: A file cannot be read.
    """
    digests: FileDigests = {}
    for file in found:
        # The state is read before the bytes: a write in between then shows as a change next time.
        state = file_state(file.path)
        before = known.get(str(file.path))
        if before is not None and tuple(before[:2]) == (state.size, state.version):
            digests[str(file.path)] = before
        else:
            digest = hashlib.sha256(file.path.read_bytes()).hexdigest()
            digests[str(file.path)] = (state.size, state.version, digest)
    return digests


def read_texts(found: Sequence[EvaluationFile], field: str) -> Iterator[EvaluationText]:
    """Every text of the files: the lines of a ``.txt``, the values of ``field`` in a ``.jsonl``.

    Empty lines are passed over.

    Raises:
        EvaluationSetError: A file is not UTF-8, or a line of JSON Lines has no such text.
        OSError: A file cannot be read.
    """
    for file in found:
        try:
            lines = file.path.read_bytes().decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise EvaluationSetError(
                f"The evaluation file {file.path} is not UTF-8 (byte {error.start}). Save it as UTF-8."
            ) from error
        is_json = file.name.lower().endswith(".jsonl")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            text = _field(line, field, f"{file.path}, line {number}") if is_json else line.strip()
            yield EvaluationText(file.name, number, text)


def _field(line: str, field: str, where: str) -> str:
    try:
        value: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise EvaluationSetError(
            f"The evaluation file {where} is not JSON ({error}). Write one object per line, or name the "
            "file .txt if its lines are the texts."
        ) from error
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        fields = ", ".join(map(repr, value)) if isinstance(value, dict) else "none, it is no object"
        raise EvaluationSetError(
            f"The evaluation file {where} has no text in the field {field!r}; its fields are "
            f"{shorten(fields)}. Name the field that holds the text (text_field)."
        )
    text: str = value[field]
    return text


def _is_hidden(path: UPath, folder: UPath) -> bool:
    return any(part.startswith(".") for part in _relative(path, folder).split("/"))


def _relative(path: UPath, folder: UPath) -> str:
    return posixpath.relpath(path.path, folder.path)
