"""Parsing of one row's JSON text into a sample, or into the reason why the row is refused.

`row_layout` reads the layout of a row; this module makes a conversation with a key from it.
Nothing here looks at files: `image_root` checks whether the images exist.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scalselect_assets.method.representation.conversation import IMAGE, Conversation, Part, Role, Turn
from scalselect_assets.method.representation.rejection import Rejection, RejectionReason
from scalselect_assets.resources.row_images import IMAGE_MARK, STANDARD_FIELDS, RowError, Slot
from scalselect_assets.resources.row_layout import LaidOutRow, RowFormat, lay_out
from scalselect_assets.resources.written_json import NotJsonError, canonical, decode, encode, kind_of, members

KEY_LENGTH = 32
"""Hex digits of a sample key: 128 bits, so that chance collisions do not happen in any pool."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A row with everything that a training sample needs; its images are still references."""

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
    """The result of reading one row: exactly one of ``sample`` and ``rejection`` is set."""

    source_id: str | None
    """The row's ``id``, also of a rejected row if it could be read."""
    sample: Sample | None = None
    rejection: Rejection | None = None


def parse_row(text: str, row: int = 0, *, keep_text_only: bool = False) -> ParsedRow:
    """Read one row.

    If a key occurs twice, the last value counts, as in every common JSON reader.

    Args:
        text: The row's JSON text.
        row: Its place in the shard, kept in the sample.
        keep_text_only: Whether a row without an image is a sample, too, for training without scoring.

    Returns:
        The sample or the rejection. Reasons are tried in this order: ``malformed_row``, ``other_media``,
        ``foreign_image_mark``, ``unread_image``, ``text_only``, ``image_count_mismatch``,
        ``no_instruction_text``. Never raises on any text.
    """
    source_id = None
    try:
        value = decoded_row(text)
        source_id = _source_id(value.get("id"))
        laid_out = lay_out(value)
        images = tuple(image.name for image in laid_out.images)
        _require_encodable(laid_out.texts, images)
    except RowError as error:
        return _rejected(source_id, error.reason, str(error))

    conversation = conversation_of(laid_out.texts)
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
    return ParsedRow(source_id, sample=Sample(row, source_id, laid_out.row_format, conversation, images))


def with_image_paths(text: str, image_paths: Sequence[str]) -> str:
    """A sample's row with other image references.

    Where only ``images`` or ``image`` name them as paths, every other character stays as it was; where they
    stand in turns, in objects or under other names, the row is written again with the same values.

    Args:
        text: The JSON text of a row that ``parse_row`` accepts.
        image_paths: A reference for each of its images.
    """
    if not image_paths:
        return text
    row = decoded_row(text)
    laid_out = lay_out(row)
    slots = [slot for image in laid_out.images for slot in image.slots]
    if all(_is_plain(row, slot) for slot in slots):
        return _with_plain_paths(text, image_paths)
    _rename(laid_out, image_paths)
    return encode(row)


def _rename(laid_out: LaidOutRow, image_names: Sequence[str]) -> None:
    """Write other names of the images into the row that was laid out."""
    # The last image in a text is renamed first, so that the places of the others stay valid.
    for image, name in reversed(list(zip(laid_out.images, image_names, strict=True))):
        for slot in image.slots:
            slot.put(name)


def _is_plain(row: Mapping[str, object], slot: Slot) -> bool:
    """Whether a place is a path in one of the row's standard fields."""
    return (slot.holder is row and slot.key in STANDARD_FIELDS) or any(
        row.get(name) is slot.holder for name in STANDARD_FIELDS if isinstance(slot.holder, list)
    )


def _with_plain_paths(text: str, image_paths: Sequence[str]) -> str:
    pieces: list[str] = []
    kept = 0
    for name, value, start, end in members(text):
        if name in STANDARD_FIELDS and value is not None and value not in ("", []):
            written = image_paths[0] if isinstance(value, str) else list(image_paths)
            pieces += [text[kept:start], json.dumps(written, ensure_ascii=False)]
            kept = end
    return "".join([*pieces, text[kept:]])


def written_turns(text: str) -> tuple[tuple[Role, str], ...]:
    """The turns of a row that ``parse_row`` takes, or refuses as ``text_only`` only, their texts as written.

    Every image has its mark: those of a row that places none stand before the first user text, as in the
    sample's conversation. A row's own system text is a leading system turn.

    Raises:
        ValueError: ``parse_row`` would refuse the row for what it says.
    """
    return lay_out(decoded_row(text)).texts


def conversation_of(turns: Iterable[tuple[Role, str]]) -> Conversation:
    """The conversation that the model is given: turns whose texts are split at the image marks."""
    return Conversation(tuple(Turn(role, _parts(content)) for role, content in turns))


def content_key(sample: Sample, image_names: Sequence[str]) -> str:
    """The base of the sample's key: equal content, equal key, on every machine.

    It covers each turn's role, texts and mark places, and the images: by their path below the image root, or
    by the hash of their bytes where the shard holds them. It does not cover the ``id``, the row's other
    fields, the way in which the JSON is written, or the bytes of image files.

    Args:
        sample: The sample.
        image_names: Its images in order: paths relative to the image root, hashes of embedded images, and for
            an image that cannot be there its reference as written.
    """
    images = json.dumps(list(image_names), ensure_ascii=False, separators=(",", ":"))
    return _digest(f'{{"turns":{sample.conversation.to_json()},"images":{images}}}')


def repeat_key(text: str, image_names: Sequence[str]) -> str:
    """A key shared only by repeats: rows that are equal in everything but their id.

    Args:
        text: The JSON text of a row that ``parse_row`` accepts.
        image_names: Names of its images in order, in the form that ``content_key`` takes.
    """
    row = decoded_row(text)
    row.pop("id", None)
    _rename(lay_out(row), image_names)
    try:
        return _digest(canonical(row))
    except RecursionError:
        return _digest(text)  # a field this deep is compared as written


def text_key(text: str) -> str:
    """The base of the key of a rejected row that has no conversation: a hash of its text."""
    return _digest(f"text:{text}")


def occurrence_key(base: str, occurrence: int) -> str:
    """The key of the n-th row (from 0) with this base; the first keeps the base itself."""
    return base if occurrence == 0 else _digest(f"{base}#{occurrence}")


def decoded_row(text: str) -> dict[str, object]:
    """The JSON object of a row.

    Raises:
        RowError: The row is not a JSON object.
    """
    try:
        value = decode(text)
    except NotJsonError as error:
        raise RowError(str(error)) from error
    if not isinstance(value, dict):
        raise RowError(f"the row is {kind_of(value)}; write an object with `messages`")
    return value


def _source_id(value: object) -> str | None:
    if value is None:
        return None
    try:
        written = value if isinstance(value, str) else encode(value)
    except RecursionError as error:
        raise RowError("the row's `id` is nested too deeply to be read; give a string or a number") from error
    # A lone surrogate has no UTF-8 form. Its escape has one, and the file spells it that way.
    return written.encode(errors="backslashreplace").decode()


def _require_encodable(turns: Iterable[tuple[Role, str]], images: tuple[str, ...]) -> None:
    for text in (*(content for _, content in turns), *images):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            escape = f"\\u{ord(text[error.start]):04x}"
            msg = f"a text of the row holds the lone surrogate {escape}, which is no character; remove it"
            raise RowError(msg) from error


def _parts(content: str) -> tuple[Part, ...]:
    """A turn's pieces around its marks, stripped and without empty ones; text without a mark stays as is."""
    first, *others = content.split(IMAGE_MARK)
    if not others:
        return (content,)
    parts: list[Part] = [first.strip()]
    for piece in others:
        parts += [IMAGE, piece.strip()]
    return tuple(part for part in parts if part)


def _rejected(source_id: str | None, reason: RejectionReason, detail: str) -> ParsedRow:
    return ParsedRow(source_id, rejection=Rejection(reason, detail))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:KEY_LENGTH]
