"""From one row's JSON text to a sample, or to the reason why it is none.

Two layouts are read, told apart by the key that holds the turns: ``messages`` with ``role`` and ``content``
(ShareGPT as LLaMA-Factory and most trainers write it) and ``conversations`` with ``from`` and ``value``
(LLaVA). Nothing here looks at files: whether the images exist is `image_root`'s concern.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from scalselect_assets.method.representation.conversation import IMAGE, Conversation, Part, Role, Turn
from scalselect_assets.method.representation.rejection import Rejection, RejectionReason

RowFormat: TypeAlias = Literal["sharegpt", "llava"]

IMAGE_MARK = IMAGE.value
KEY_LENGTH = 32
"""Hex digits of a sample key: 128 bits, so that chance collisions do not happen in any pool."""

_ROLES: Mapping[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
_LAYOUTS: tuple[tuple[str, RowFormat], ...] = (("messages", "sharegpt"), ("conversations", "llava"))
_IMAGE_FIELDS = ("images", "image")
_BETWEEN = re.compile(r"[ \t\r\n,:]*")


@dataclass(frozen=True, slots=True)
class Sample:
    """A row that says what a training sample has to say; its images are references still."""

    row: int
    """Place in the shard, from 0."""
    source_id: str | None
    """The row's ``id`` verbatim as a string; None where it has none."""
    row_format: RowFormat
    conversation: Conversation
    images: tuple[str, ...]
    """Image references verbatim, one for each mark of the conversation and in the same order."""


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """One row, read: exactly one of ``sample`` and ``rejection`` is there."""

    source_id: str | None
    """Also for a rejected row, where its ``id`` could be read."""
    sample: Sample | None = None
    rejection: Rejection | None = None


def parse_row(text: str, row: int = 0, *, keep_text_only: bool = False) -> ParsedRow:
    """Read one row.

    Of a key that occurs twice the last value counts, as in every common JSON reader.

    Args:
        text: The row's JSON text.
        row: Its place in the shard, kept in the sample.
        keep_text_only: A row without an image is a sample, too: for who trains on rows and scores none.

    Returns:
        The sample or the rejection. Reasons are tried in this order: ``malformed_row``, ``text_only``,
        ``image_count_mismatch``, ``no_instruction_text``. Never raises on any text.
    """
    source_id = None
    try:
        value = _decode(text)
        if not isinstance(value, dict):
            return _malformed(None, f"the row is {_kind(value)}; write an object with `messages`")
        source_id = _source_id(value.get("id"))
        turns, row_format = _turns(value)
        images = _images(value)
        _require_encodable(turns, images)
        if images and not any(IMAGE_MARK in content for _, content in turns):
            turns = _with_leading_marks(turns, len(images))
    except _MalformedRowError as error:
        return _malformed(source_id, str(error))

    conversation = conversation_of(turns)
    n_marks = conversation.n_images
    if not images and not n_marks and not keep_text_only:
        return _rejected(
            source_id,
            RejectionReason.TEXT_ONLY,
            "the row has no image; ScalSelect scores image rows only, so add text rows to the training mix "
            "after the selection",
        )
    if n_marks != len(images):
        return _rejected(
            source_id,
            RejectionReason.IMAGE_COUNT_MISMATCH,
            f"the turns hold {n_marks} {IMAGE_MARK} mark(s) but the row names {len(images)} image(s); "
            "give every image one mark, or no image any",
        )
    if not any(piece.strip() for piece in conversation.texts("user", "system")):
        return _rejected(
            source_id,
            RejectionReason.NO_INSTRUCTION_TEXT,
            "no user or system turn has any text, and without an instruction there is no attention to score "
            "by; write the question into a user turn",
        )
    return ParsedRow(source_id, sample=Sample(row, source_id, row_format, conversation, images))


def with_image_paths(text: str, image_paths: Sequence[str]) -> str:
    """A sample's row with other image references, every other character as it was.

    Args:
        text: The JSON text of a row that ``parse_row`` accepts.
        image_paths: A reference for each of its images.
    """
    pieces: list[str] = []
    kept = 0
    for field, value, start, end in _members(text):
        if field in _IMAGE_FIELDS and value is not None and value not in ("", []):
            written = image_paths[0] if isinstance(value, str) else list(image_paths)
            pieces += [text[kept:start], json.dumps(written, ensure_ascii=False)]
            kept = end
    return "".join([*pieces, text[kept:]])


def written_turns(text: str) -> tuple[tuple[Role, str], ...]:
    """The turns of a row that ``parse_row`` takes, or refuses as ``text_only`` only, their texts as written.

    Every image has its mark: those of a row that places none stand before the first user text, as in the
    sample's conversation. A row's own system text is a leading system turn.

    Raises:
        ValueError: ``parse_row`` would call the row malformed.
    """
    row = _decode(text)
    if not isinstance(row, dict):
        msg = f"the row is {_kind(row)}; write an object with `messages`"
        raise _MalformedRowError(msg)
    turns, _ = _turns(row)
    images = _images(row)
    if images and not any(IMAGE_MARK in content for _, content in turns):
        turns = _with_leading_marks(turns, len(images))
    return tuple(turns)


def conversation_of(turns: Iterable[tuple[Role, str]]) -> Conversation:
    """Turns as written, their texts split at the image marks, as the model is given them."""
    return Conversation(tuple(Turn(role, _parts(content)) for role, content in turns))


def content_key(sample: Sample, image_paths: Sequence[str]) -> str:
    """The base of the sample's key: equal content, equal key, on every machine.

    It covers each turn's role, texts and mark places, and the images by their path below the image root. It
    does not cover the ``id``, the row's other fields, the way in which the JSON is written, or the images'
    bytes.

    Args:
        sample: The sample.
        image_paths: Its images in order, relative to the image root (for an image that cannot be there, its
            reference as written).
    """
    images = json.dumps(list(image_paths), ensure_ascii=False, separators=(",", ":"))
    return _digest(f'{{"turns":{sample.conversation.to_json()},"images":{images}}}')


def text_key(text: str) -> str:
    """The base of the key of a rejected row that has no conversation: a hash of its text."""
    return _digest(f"text:{text}")


def occurrence_key(base: str, occurrence: int) -> str:
    """The key of the n-th row (from 0) with this base; the first keeps the base itself."""
    return base if occurrence == 0 else _digest(f"{base}#{occurrence}")


def shorten(text: str, limit: int = 120) -> str:
    """``text`` quoted for a message, cut where it is longer than a message should be (embedded images)."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}... ({len(text)} characters)"


class _MalformedRowError(ValueError):
    """The row breaks the layout; the message is the rejection's detail."""


@dataclass(frozen=True, slots=True)
class _Number:
    """A JSON number as written: ids keep their spelling, and no digit limit or overflow applies."""

    text: str


_DECODER = json.JSONDecoder(parse_int=_Number, parse_float=_Number, parse_constant=_Number)


def _decode(text: str) -> object:
    try:
        value: object = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        msg = f"the row is not valid JSON: {error.msg} at character {error.pos}; write it again as JSON"
        raise _MalformedRowError(msg) from error
    except RecursionError as error:
        msg = "the row is nested too deeply to be read; write a flat list of turns"
        raise _MalformedRowError(msg) from error
    return value


def _members(text: str) -> Iterator[tuple[str, object, int, int]]:
    """Key, value and the value's place for every member of the object that ``text`` is."""
    position = _skip(text, text.index("{") + 1)
    while text[position] == '"':
        key, position = _DECODER.raw_decode(text, position)
        start = _skip(text, position)
        value, end = _DECODER.raw_decode(text, start)
        yield key, value, start, end
        position = _skip(text, end)


def _skip(text: str, position: int) -> int:
    match = _BETWEEN.match(text, position)
    return match.end() if match else position


def _source_id(value: object) -> str | None:
    if value is None:
        return None
    try:
        written = value if isinstance(value, str) else _json_text(value)
    except RecursionError as error:
        msg = "the row's `id` is nested too deeply to be read; give a string or a number"
        raise _MalformedRowError(msg) from error
    # A lone surrogate has no UTF-8; its escape does, and it is how the file spells it.
    return written.encode(errors="backslashreplace").decode()


def _json_text(value: object) -> str:
    """``value`` as JSON, numbers as they were written."""
    pieces: list[str] = []
    _write_json(value, pieces)
    return "".join(pieces)


def _write_json(value: object, pieces: list[str]) -> None:
    """Append the JSON of ``value``; each piece is written once, however deep it lies."""
    match value:
        case _Number():
            pieces.append(value.text)
        case list():
            pieces.append("[")
            for place, item in enumerate(value):
                pieces.append(", " if place else "")
                _write_json(item, pieces)
            pieces.append("]")
        case dict():
            pieces.append("{")
            for place, (key, item) in enumerate(value.items()):
                pieces.append(f"{', ' if place else ''}{json.dumps(key, ensure_ascii=False)}: ")
                _write_json(item, pieces)
            pieces.append("}")
        case _:
            pieces.append(json.dumps(value, ensure_ascii=False))


def _turns(row: dict[str, object]) -> tuple[list[tuple[Role, str]], RowFormat]:
    """Role and text of every turn, a leading system turn for the row's own ``system`` included."""
    present = [(key, row_format) for key, row_format in _LAYOUTS if row.get(key)]
    if len(present) > 1:
        msg = "the row has both `messages` and `conversations`; keep the one that holds the sample"
        raise _MalformedRowError(msg)
    if not present:
        held = [key for key, _ in _LAYOUTS if key in row]
        found = f"`{held[0]}` is empty" if held else "the row has neither `messages` nor `conversations`"
        msg = f"{found}; give a list of turns with a user and an assistant turn"
        raise _MalformedRowError(msg)
    key, row_format = present[0]
    items = row[key]
    if not isinstance(items, list):
        msg = f"`{key}` is {_kind(items)}; give a list of turns"
        raise _MalformedRowError(msg)
    turns = [_turn(item, place, row_format) for place, item in enumerate(items)]

    system = row.get("system")
    if not isinstance(system, str | None):
        msg = f"`system` is {_kind(system)}; give a string or leave it out"
        raise _MalformedRowError(msg)
    # LLaMA-Factory lets a system turn stand in for the row's own system text; so do we.
    if system and system.strip() and turns[0][0] != "system":
        turns.insert(0, ("system", system))
    if not any(role == "assistant" for role, _ in turns):
        msg = f"none of the {len(turns)} turn(s) is an assistant's; give the row the answer to learn"
        raise _MalformedRowError(msg)
    return turns, row_format


def _turn(item: object, place: int, row_format: RowFormat) -> tuple[Role, str]:
    if not isinstance(item, dict):
        msg = f"turn {place} is {_kind(item)}; give an object with a role and a text"
        raise _MalformedRowError(msg)
    role_fields, text_fields = ("role", "from"), ("content", "value")
    if row_format == "llava":
        role_fields, text_fields = role_fields[::-1], text_fields[::-1]
    name = _first(item, role_fields)
    role = _ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        shown = shorten(name) if isinstance(name, str) else _kind(name)
        msg = (
            f"turn {place} has {shown} for its role; allowed are user, human, assistant, gpt and system, so "
            "rename or remove that turn"
        )
        raise _MalformedRowError(msg)
    content = _first(item, text_fields)
    if not isinstance(content, str):
        msg = f"the content of turn {place} is {_kind(content)}; give a string with {IMAGE_MARK} marks"
        raise _MalformedRowError(msg)
    return role, content


def _first(item: dict[str, object], fields: tuple[str, str]) -> object:
    # A table's export spells a column that a row lacks as null.
    value = item.get(fields[0])
    return item.get(fields[1]) if value is None else value


def _images(row: dict[str, object]) -> tuple[str, ...]:
    """The image references of ``images`` or ``image``."""
    found: dict[tuple[str, ...], str] = {}
    for field in _IMAGE_FIELDS:
        value = row.get(field)
        if value is None or value in ("", []):
            continue
        references = [value] if isinstance(value, str) else value
        if not isinstance(references, list):
            msg = f"`{field}` is {_kind(value)}; give a path or a list of paths"
            raise _MalformedRowError(msg)
        paths = tuple(reference for reference in references if isinstance(reference, str) and reference)
        if len(paths) < len(references):
            odd = next(item for item in references if not (isinstance(item, str) and item))
            msg = f"`{field}` holds {_kind(odd)}; give a list of paths that are not empty"
            raise _MalformedRowError(msg)
        found[paths] = field
    if len(found) > 1:
        msg = "the row's `images` and `image` name different images; keep the one that is right"
        raise _MalformedRowError(msg)
    return next(iter(found), ())


def _require_encodable(turns: list[tuple[Role, str]], images: tuple[str, ...]) -> None:
    for text in (*(content for _, content in turns), *images):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            escape = f"\\u{ord(text[error.start]):04x}"
            msg = f"a text of the row holds the lone surrogate {escape}, which is no character; remove it"
            raise _MalformedRowError(msg) from error


def _with_leading_marks(turns: list[tuple[Role, str]], n_images: int) -> list[tuple[Role, str]]:
    """The turns with all marks before the first user text, for a row that places none."""
    users = [place for place, (role, _) in enumerate(turns) if role == "user"]
    if not users:
        msg = f"the row has {n_images} image(s) but no user turn to show them in; add a user turn"
        raise _MalformedRowError(msg)
    place = next((place for place in users if turns[place][1].strip()), users[0])
    role, content = turns[place]
    return [*turns[:place], (role, IMAGE_MARK * n_images + content), *turns[place + 1 :]]


def _parts(content: str) -> tuple[Part, ...]:
    """A turn's pieces around its marks, stripped and without empty ones; text without a mark stays as is."""
    first, *others = content.split(IMAGE_MARK)
    if not others:
        return (content,)
    parts: list[Part] = [first.strip()]
    for piece in others:
        parts += [IMAGE, piece.strip()]
    return tuple(part for part in parts if part)


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    match value:
        case None:
            return "null or absent"
        case bool():
            return "a boolean"
        case _Number():
            return f"the number {value.text[:40]}"
        case str():
            return f"the string {shorten(value)}"
        case list():
            return f"a list of {len(value)}"
        case _:
            return "an object"


def _malformed(source_id: str | None, detail: str) -> ParsedRow:
    return _rejected(source_id, RejectionReason.MALFORMED_ROW, detail)


def _rejected(source_id: str | None, reason: RejectionReason, detail: str) -> ParsedRow:
    return ParsedRow(source_id, rejection=Rejection(reason, detail))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:KEY_LENGTH]
