"""The common base of all export formats: their input, their reports and shared rules.

A format refuses rows that its trainer cannot express, writes the others, and then reads its own files back by
the trainer's rules (the preflight). It does not choose or order rows, nor place images; `publish` does.
"""

import enum
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Protocol

from upath import UPath

from scalselect_assets.dataset.exports.rows import ExportRow
from scalselect_assets.declaration.export_specs import ExportSpec
from scalselect_assets.method.representation.conversation import Role
from scalselect_assets.resources.folders import HashedStream, NewFolder
from scalselect_assets.resources.row_images import IMAGE_MARK
from scalselect_assets.resources.shard_reader import ShardFormatError, iter_rows

HF_CHUNK_BYTES = 10 << 20
"""The size of the first chunk of a file, 10 MiB (``JsonConfig.chunksize``), from which the JSON reader of
Hugging Face ``datasets`` infers the columns' types. The reader fails at a type that only later rows show, so
a row with an image must begin within this chunk."""

_PROBLEMS_LISTED = 20


class RefusalReason(enum.StrEnum):
    """The typed reason in ``rejected.jsonl`` for which a format refuses a chosen row."""

    TURN_ORDER = "turn_order"
    SYSTEM_TURN = "system_turn"
    SEVERAL_IMAGES = "several_images"
    IMAGE_PLACE = "image_place"
    RESERVED_TEXT = "reserved_text"
    OBJECTS_UNREAD = "objects_unread"
    TOOLS_UNREAD = "tools_unread"
    TURN_WEIGHT_UNREAD = "turn_weight_unread"
    EMPTY_TEXT = "empty_text"
    IMAGE_CHANGED = "image_changed"
    IMAGE_MISSING = "image_missing"


class Carried(enum.StrEnum):
    """A field of a row that a trainer acts on, which a format may pass on."""

    OBJECTS = "objects"
    TOOLS = "tools"
    TURN_WEIGHTS = "turn_weights"


@dataclass(frozen=True, slots=True)
class Refusal:
    """The refusal of one row: the typed reason, and the trainer's behaviour with such a row."""

    reason: RefusalReason
    detail: str


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image as an export refers to it.

    Attributes:
        reference: The image's path in the trainer's file, relative to `Setting.images_base`.
        sha256: Hash of the image's bytes.
        data: The image's bytes, for formats that embed images.
    """

    reference: str
    sha256: str
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class PlacedRow:
    """A row that is to be written, with its images in order."""

    row: ExportRow
    images: tuple[PlacedImage, ...]

    @property
    def references(self) -> list[str]:
        """The images as the trainer's file names them."""
        return [image.reference for image in self.images]


@dataclass(frozen=True, slots=True)
class Setting:
    """The circumstances of an export.

    Attributes:
        spec: The declaration.
        name: The name of the dataset in companion files: letters, digits, underscores.
        images_base: The folder that image references start at, as an absolute path or a URI.
        image_is_there: Tells the preflight whether a reference leads to a file.
    """

    spec: ExportSpec
    name: str
    images_base: str
    image_is_there: Callable[[str], bool]

    def absolute(self, reference: str) -> str:
        """The reference as an absolute path or URI."""
        return posixpath.join(self.images_base, reference)

    def relative(self, reference: str) -> str:
        """The inverse of ``absolute``; a reference that does not start at the base is returned unchanged."""
        return reference.removeprefix(posixpath.join(self.images_base, ""))


@dataclass(slots=True)
class Preflight:
    """The result of reading the written files by the trainer's rules.

    Attributes:
        rows: Number of rows that the trainer would see.
        images: Number of images in these rows; a repeated image counts each time.
        text_only: Number of rows without an image.
        carried: Number of rows with each kind of `Carried` field.
        n_problems: Number of violations of the rules.
        problems: Descriptions of the first violations.
    """

    rows: int = 0
    images: int = 0
    text_only: int = 0
    carried: Counter[str] = field(default_factory=Counter)
    n_problems: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no rule is broken."""
        return not self.n_problems

    def row(self, n_images: int) -> None:
        """Count a row."""
        self.rows += 1
        self.images += n_images
        self.text_only += not n_images

    def problem(self, text: str) -> None:
        """Count a broken rule."""
        self.n_problems += 1
        if len(self.problems) < _PROBLEMS_LISTED:
            self.problems.append(text)

    def require(self, holds: object, text: str) -> bool:
        """Count a broken rule unless it holds; returns whether it does."""
        if not holds:
            self.problem(text)
        return bool(holds)

    def to_json(self) -> dict[str, Any]:
        """The result for the manifest."""
        return {
            "passed": self.passed,
            "rows": self.rows,
            "images": self.images,
            "text_only": self.text_only,
            "carried": dict(sorted(self.carried.items())),
            "n_problems": self.n_problems,
            "problems": self.problems,
        }


class Export(Protocol):
    """One trainer's format."""

    name: str
    """The format's name in declarations, and the name of its folder."""
    embeds_images: bool
    """Whether the format's files hold the images' bytes."""
    carries: frozenset[Carried]
    """The fields that the trainer reads; rows with other `Carried` fields are refused."""
    image_row_first: bool
    """Whether the reader infers the columns' types from the first rows, so that a row with an image leads."""

    def refuses(self, row: ExportRow) -> Refusal | None:
        """The refusal of a row that the trainer, by its source, cannot express; None if it can."""

    def write(self, rows: Iterable[PlacedRow], folder: NewFolder, setting: Setting) -> None:
        """Write the rows and the companion file; only a few rows are in memory at a time.

        Raises:
            OSError: The files cannot be written.
        """

    def preflight(self, folder: NewFolder, setting: Setting) -> Preflight:
        """Read the written files as the trainer does, by the trainer's rules.

        Raises:
            OSError: The files cannot be read.
        """


# Refusals

OTHER_MEDIA = ("<video>", "<audio>")
_GROUNDING = ("<bbox>", "<ref-object>")


def refuse_turn_order(turns: Sequence[tuple[Role, str]]) -> Refusal | None:
    """Refuse a row, for some trainers, unless user and assistant alternate from a user to an answer."""
    if fault := unpaired([role for role, _ in turns], "user", "assistant"):
        return Refusal(RefusalReason.TURN_ORDER, f"{fault}; the trainer skips or alters such rows")
    return None


def refuse_system(row: ExportRow) -> Refusal | None:
    """Refuse a row with a system turn, for trainers that do not support one."""
    if any(role == "system" for role, _ in row.turns):
        detail = "it has a system turn, which the trainer has no role for"
        return Refusal(RefusalReason.SYSTEM_TURN, detail)
    return None


def refuse_images_of(row: ExportRow, *roles: Role) -> Refusal | None:
    """Refuse a row with an image in a turn of these roles, for trainers that do not show images there."""
    for role, text in row.turns:
        if role in roles and IMAGE_MARK in text:
            detail = f"a turn of role {role} has an image, which the trainer does not show there"
            return Refusal(RefusalReason.IMAGE_PLACE, detail)
    return None


def refuse_reserved(texts: Iterable[str], marks: Sequence[str]) -> Refusal | None:
    """Refuse texts with marks that the trainer interprets itself."""
    for text in texts:
        for mark in marks:
            if mark in text:
                detail = f"its text holds {mark!r}, which the trainer takes for a mark of its own"
                return Refusal(RefusalReason.RESERVED_TEXT, detail)
    return None


def refuse_wordless(row: ExportRow) -> Refusal | None:
    """Refuse a row without any word, for trainers that stop at a row of length 0."""
    if not any(text.split() for _, text in row.turns):
        return Refusal(
            RefusalReason.EMPTY_TEXT, "none of its turns has a word; the trainer stops at length 0"
        )
    return None


def unpaired(roles: Sequence[str], user: str, assistant: str) -> str | None:
    """The first fault in roles that must alternate from ``user`` on and end with ``assistant``, or None."""
    for place, role in enumerate(roles):
        if role != (wanted := (user, assistant)[place % 2]):
            return f"turn {place} is of role {role!r} where {wanted!r} is expected"
    return "the last turn has no answer" if len(roles) % 2 or not roles else None


# Writing

_LLAVA_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


def llava_turns(row: ExportRow) -> list[dict[str, str]]:
    """The turns in the format of LLaVA, with ``from`` and ``value``."""
    return [{"from": _LLAVA_ROLES[role], "value": text} for role, text in row.turns]


def llava_row(placed: PlacedRow) -> dict[str, Any]:
    """A row for trainers that read ``image`` as one path or a list; a row without images has no such key."""
    references = placed.references
    images: dict[str, Any] = (
        {"image": references if len(references) > 1 else references[0]} if references else {}
    )
    return {
        "id": placed.row.id,
        "sample_key": placed.row.sample_key,
        **images,
        "conversations": llava_turns(placed.row),
    }


def openai_turns(row: ExportRow) -> list[dict[str, Any]]:
    """The turns with ``role`` and ``content``; the image marks are in the text."""
    return [{"role": role, "content": text} for role, text in row.turns]


def weighted_turns(row: ExportRow) -> list[dict[str, Any]]:
    """The turns of ``openai_turns``, with ``loss: false`` for answers that must not be learnt.

    A share of the loss is written under the row's own key, ``loss_scale`` or else ``weight``.
    """
    turns = openai_turns(row)
    for turn, weight, scale in zip(turns, row.trained.weights, row.trained.loss_scales, strict=True):
        if scale is not None:
            turn["loss_scale"] = scale
        elif weight == 0:
            turn["loss"] = False
        elif weight != 1:
            turn["weight"] = weight
    return turns


def carries_weights(messages: Iterable[dict[str, Any]]) -> bool:
    """Whether a written row states loss weights for its answers."""
    return any(
        message.get(name) is not None for message in messages for name in ("loss", "loss_scale", "weight")
    )


def write_json_lines(
    rows: Iterable[dict[str, Any]], folder: NewFolder, name: str, *, escaped: bool = False
) -> None:
    """Write one row per line, ``escaped`` to ASCII for trainers that open files in the locale's encoding."""
    with folder.stream(name) as file:
        for row in rows:
            write_line(file, row, escaped=escaped)


def write_line(file: HashedStream, row: dict[str, Any], *, escaped: bool = False) -> None:
    """Append a row as a line."""
    file.write(json.dumps(row, ensure_ascii=escaped).encode() + b"\n")
    file.rows = (file.rows or 0) + 1


def write_json_array(rows: Iterable[dict[str, Any]], folder: NewFolder, name: str) -> None:
    """Write a JSON array, one row per line, in ASCII, for trainers that load it in the locale's encoding."""
    with folder.stream(name) as file:
        file.write(b"[")
        file.rows = 0
        for row in rows:
            file.write((b",\n" if file.rows else b"\n") + json.dumps(row).encode())
            file.rows += 1
        file.write(b"\n]\n")


def write_companion(folder: NewFolder, name: str, text: str) -> None:
    """Write a companion file in ASCII."""
    folder.write(name, text.encode("ascii"))


def ascii_json(value: Any) -> str:
    """A value as readable JSON in ASCII."""
    return json.dumps(value, indent=2) + "\n"


# Reading back


def read_json_rows(path: UPath, verdict: Preflight) -> Iterator[dict[str, Any]]:
    """The rows of a JSON array or JSON Lines file, one at a time; anything else in it is a problem."""
    try:
        for row in iter_rows(path):
            value: Any = None if row.error else json.loads(row.text)
            if verdict.require(isinstance(value, dict), f"{path.name} line {row.line} is no JSON object"):
                yield value
    except (ShardFormatError, json.JSONDecodeError) as error:
        verdict.problem(f"{path.name} cannot be read: {error}")


def require_soon(
    path: UPath, features: Mapping[str, Callable[[dict[str, Any]], bool]], verdict: Preflight
) -> None:
    """Check the rule of `HF_CHUNK_BYTES` on a JSON Lines file; all its other checks must have passed.

    Args:
        path: The file.
        features: Optional features of a row, such as an image, each with a test for it.
        verdict: The result to which a feature that first appears too late is added as a problem.
    """
    if not verdict.passed:
        return
    position, waiting = 0, dict(features)
    with path.open("rb") as file:
        for line in file:
            found = [name for name, has in waiting.items() if has(json.loads(line))]
            for name in found:
                del waiting[name]
                verdict.require(
                    position < HF_CHUNK_BYTES,
                    f"{path.name}: the first row with {name} begins at byte {position}; `datasets` takes "
                    f"the columns' types from the first {HF_CHUNK_BYTES} bytes and then fails",
                )
            if not waiting:
                return
            position += len(line)


def require_ascii(path: UPath, verdict: Preflight) -> None:
    """Require that a file is ASCII, since the trainer opens it in the locale's encoding."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            if not block.isascii():
                verdict.problem(f"{path.name} is not ASCII; the trainer opens it in the locale's encoding")
                return


def require_images(references: Sequence[str], where: str, setting: Setting, verdict: Preflight) -> None:
    """Require that every reference leads to a file from the images' base."""
    for reference in references:
        verdict.require(
            setting.image_is_there(reference), f"{where}: image {reference!r} is not at {setting.images_base}"
        )


def require_marks(texts: Iterable[str], n_images: int, where: str, verdict: Preflight) -> None:
    """Require that the texts have as many image marks as the row has images."""
    n_marks = sum(text.count(IMAGE_MARK) for text in texts)
    verdict.require(n_marks == n_images, f"{where}: {n_marks} image marks for {n_images} images")


def require_filled(texts: Iterable[str], where: str, verdict: Preflight) -> None:
    """Require that no text has an unfilled placeholder or a mark of other media."""
    for text in texts:
        bare = next((mark for mark in (*_GROUNDING, *OTHER_MEDIA) if mark in text), None)
        verdict.require(bare is None, f"{where}: a bare {bare} in its text")


def is_text_list(value: object) -> bool:
    """Whether a JSON value is a list of strings that are not empty."""
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def safe_suffix(path: str) -> str:
    """The suffix of an image's file name, or an empty text if the suffix is unusual."""
    suffix = PurePosixPath(path).suffix.lower()
    return suffix if suffix[1:].isascii() and suffix[1:].isalnum() and len(suffix) <= 6 else ""
