"""The layout of a row: its turns, their roles, and the place of each image.

The key that holds the turns decides the layout: ``messages`` with ``role`` and ``content``
(ShareGPT as LLaMA-Factory and most trainers write it) and ``conversations`` with ``from`` and ``value``
(LLaVA). A turn's content is a text with marks, or a list of parts as OpenAI, TRL, Axolotl and Hugging Face
chat templates have it; either becomes one text with a mark for each image.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from scalselect_assets.method.representation.conversation import Role
from scalselect_assets.method.representation.rejection import RejectionReason
from scalselect_assets.resources.row_images import (
    FOREIGN_MARKS,
    IMAGE_MARK,
    IMAGES_IN_TEXT,
    NAMED_IN_TEXT,
    OTHER_MEDIA_MARKS,
    Reference,
    RowError,
    Slot,
    images_of,
    may_hold_marks,
    other_media,
    references_of,
    require_no_other_media,
    unread_image,
    unread_media,
)
from scalselect_assets.resources.written_json import Number, kind_of, shorten

RowFormat: TypeAlias = Literal["sharegpt", "llava"]

_ROLES: Mapping[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
}
LAYOUTS: tuple[tuple[str, RowFormat], ...] = (("messages", "sharegpt"), ("conversations", "llava"))
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")
_BARE_PARTS = ("text", "image", "video", "audio")
_PART_IMAGE_FIELDS = ("image", "image_url", "path", "url", "bytes", "base64")


@dataclass(slots=True)
class WrittenTurn:
    """A turn as the row has it.

    Attributes:
        role: Role of the speaker.
        text: Text of the turn, with a mark for each image.
        images: Image of each mark; None stands for the next one of the row's own images.
        fields: The turn's object in the row; None for the row's own system text.
    """

    role: Role
    text: str
    images: list[Reference | None] = field(default_factory=list)
    fields: dict[str, object] | None = None


@dataclass(frozen=True, slots=True)
class LaidOutRow:
    """A row's turns with a mark for each image, and the images in the order of the marks."""

    turns: tuple[WrittenTurn, ...]
    images: tuple[Reference, ...]
    row_format: RowFormat

    @property
    def texts(self) -> tuple[tuple[Role, str], ...]:
        """Role and text of each turn."""
        return tuple((turn.role, turn.text) for turn in self.turns)


def lay_out(row: Mapping[str, object]) -> LaidOutRow:
    """Read a decoded row.

    Raises:
        RowError: The row is malformed, has unread media, or its images cannot be told apart.
    """
    turns, row_format = _turns(row)
    require_no_other_media(row, "row")
    for turn in turns:
        _require_images_only(turn)
    own = [image for turn in turns for image in turn.images if image is not None]
    given = images_of(row, "row", any_name=not own)
    if given and not any(turn.images for turn in turns):
        _place(turns, len(given))
    _require_no_foreign_marks(turns)
    images = _matched(turns, own, given)
    if not images and not any(turn.images for turn in turns):
        _require_nothing_unread(row, turns)
    return LaidOutRow(tuple(turns), tuple(images), row_format)


def _turns(row: Mapping[str, object]) -> tuple[list[WrittenTurn], RowFormat]:
    """Every turn, a leading system turn for the row's own ``system`` included."""
    present = [(key, row_format) for key, row_format in LAYOUTS if row.get(key)]
    if len(present) > 1:
        raise RowError("the row has both `messages` and `conversations`; keep the one that holds the sample")
    if not present:
        held = [key for key, _ in LAYOUTS if key in row]
        found = f"`{held[0]}` is empty" if held else "the row has neither `messages` nor `conversations`"
        raise RowError(f"{found}; give a list of turns with a user and an assistant turn")
    key, row_format = present[0]
    items = row[key]
    if not isinstance(items, list):
        raise RowError(f"`{key}` is {kind_of(items)}; give a list of turns")
    turns = [_turn(item, place, row_format) for place, item in enumerate(items)]

    system = row.get("system")
    if not isinstance(system, str | None):
        raise RowError(f"`system` is {kind_of(system)}; give a string or leave it out")
    # LLaMA-Factory lets a system turn stand in for the row's own system text; so do we.
    if system and system.strip() and turns[0].role != "system":
        turns.insert(0, WrittenTurn("system", system, [None] * system.count(IMAGE_MARK)))
    if not any(turn.role == "assistant" for turn in turns):
        raise RowError(
            f"none of the {len(turns)} turn(s) is an assistant's; give the row the answer to learn"
        )
    return turns, row_format


def _turn(item: object, place: int, row_format: RowFormat) -> WrittenTurn:
    if not isinstance(item, dict):
        raise RowError(f"turn {place} is {kind_of(item)}; give an object with a role and a text")
    role_fields, text_fields = ("role", "from"), ("content", "value")
    if row_format == "llava":
        role_fields, text_fields = role_fields[::-1], text_fields[::-1]
    _, name = _first(item, role_fields)
    role = _ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        shown = shorten(name) if isinstance(name, str) else kind_of(name)
        raise RowError(
            f"turn {place} has {shown} for its role; allowed are {', '.join(_ROLES)}, so rename or remove "
            "that turn"
        )
    key, content = _first(item, text_fields)
    turn = WrittenTurn(role, "", fields=item)
    if isinstance(content, str):
        _read_text(turn, item, key)
    elif isinstance(content, list):
        for part_place in range(len(content)):
            _read_part(turn, content, part_place, f"part {part_place} of turn {place}")
    else:
        raise RowError(
            f"the content of turn {place} is {kind_of(content)}; give a string with {IMAGE_MARK} marks, or a "
            "list of text and image parts"
        )
    _place_own(turn, item, place)
    return turn


def _first(item: dict[str, object], fields: tuple[str, str]) -> tuple[str, object]:
    # A table's export writes null for a column that a row lacks.
    key = fields[1] if item.get(fields[0]) is None else fields[0]
    return key, item.get(key)


def _read_text(turn: WrittenTurn, holder: object, key: object) -> None:
    """Append a text, with a mark in the place of each image that it names."""
    text: str = holder[key]  # type: ignore[index]
    if not may_hold_marks(text):
        turn.text += text
        turn.images += [None] * text.count(IMAGE_MARK)
        return
    pieces, end = [], 0
    for found in IMAGES_IN_TEXT.finditer(text):
        named = found["named"]
        if named is not None and FOREIGN_MARKS.search(named):
            continue  # the model's own tokens between the model's own marks
        reference = None
        if named is not None:
            reference = Reference(named.strip(), [Slot(holder, key, found.span("named"))])
        pieces += [text[end : found.start()], IMAGE_MARK]
        turn.images.append(reference)
        end = found.end()
    turn.text += "".join([*pieces, text[end:]])


def _read_part(turn: WrittenTurn, parts: list[object], place: int, where: str) -> None:
    """Append one part of a turn's content."""
    part = parts[place]
    if isinstance(part, str):
        _read_text(turn, parts, place)
        return
    if not isinstance(part, dict):
        raise RowError(f"{where} is {kind_of(part)}; give an object with a `type`")
    kind = part.get("type")
    if kind is None:  # Qwen's own code names the kind by the field that is there
        kind = next(
            (name for name in ("text", "image", "video", "audio") if part.get(name) is not None), None
        )
    if kind in _TEXT_PARTS:
        if not isinstance(part.get("text"), str):
            raise RowError(f"`text` in {where} is {kind_of(part.get('text'))}; give a string")
        _read_text(turn, part, "text")
    elif kind in _IMAGE_PARTS:
        named = next((name for name in _PART_IMAGE_FIELDS if part.get(name) not in (None, "")), None)
        turn.text += IMAGE_MARK
        turn.images.append(_part_image(part, named, where) if named else None)
    elif isinstance(kind, str) and kind.removeprefix("input_").split("_")[0] in ("video", "audio"):
        raise other_media(f"{where} is of type {kind!r}")
    else:
        shown = shorten(kind) if isinstance(kind, str) else kind_of(kind)
        raise RowError(f"{where} has {shown} for its type; allowed are text, image and image_url")


def _part_image(part: dict[str, object], name: str, where: str) -> Reference:
    found = references_of(part, name)
    if len(found) != 1:
        raise RowError(f"`{name}` in {where} names {len(found)} images; give each one a part of its own")
    return found[0]


def _place_own(turn: WrittenTurn, item: dict[str, object], place: int) -> None:
    """Fill a turn's marks with the images that the turn's own fields name."""
    require_no_other_media(item, f"turn {place}")
    given = images_of(item, f"turn {place}")
    if not given:
        return
    if not turn.images:
        turn.text = IMAGE_MARK * len(given) + turn.text
        turn.images = list(given)
        return
    if turn.images.count(None) != len(given) or len(turn.images) != len(given):
        raise RowError(
            f"turn {place} holds {len(turn.images)} {IMAGE_MARK} mark(s) but names {len(given)} image(s); "
            "give every image one mark, or no image any",
            RejectionReason.IMAGE_COUNT_MISMATCH,
        )
    turn.images = list(given)


def _require_images_only(turn: WrittenTurn) -> None:
    """Refuse a question with the mark of a video or a sound; an answer may speak about the tag in HTML."""
    if turn.role == "assistant" or not may_hold_marks(turn.text):
        return
    if found := OTHER_MEDIA_MARKS.search(turn.text):
        raise other_media(f"a {turn.role} turn holds the mark {found[0]!r}")


def _place(turns: list[WrittenTurn], n_images: int) -> None:
    """Give a row without marks one for each image: in place of another model's marks, or before all text."""
    marked = (turn.text for turn in turns if may_hold_marks(turn.text))
    found = [mark for text in marked for mark in FOREIGN_MARKS.finditer(text)]
    numbers = [int(mark["number"]) for mark in found if mark["number"]]
    in_order = not numbers or (
        len(numbers) == n_images and numbers in (list(range(n_images)), list(range(1, n_images + 1)))
    )
    if found and len(found) == n_images and in_order:
        for turn in turns:
            turn.text, n_marks = FOREIGN_MARKS.subn(IMAGE_MARK, turn.text)
            turn.images = [None] * n_marks
        return
    if found:
        return  # the next rule refuses the row with a reason
    users = [turn for turn in turns if turn.role == "user"]
    if not users:
        raise RowError(f"the row has {n_images} image(s) but no user turn to show them in; add a user turn")
    turn = next((turn for turn in users if turn.text.strip()), users[0])
    turn.text = IMAGE_MARK * n_images + turn.text
    turn.images = [None] * n_images


def _require_no_foreign_marks(turns: list[WrittenTurn]) -> None:
    for turn in turns:
        if may_hold_marks(turn.text) and (found := FOREIGN_MARKS.search(turn.text)):
            raise RowError(
                f"the text holds {found[0]!r}, another model's mark for an image, and such marks are "
                f"translated only where the row has no {IMAGE_MARK} mark and exactly one of them for each "
                f"image, numbered in the images' order; write {IMAGE_MARK} in the places of the images",
                RejectionReason.FOREIGN_IMAGE_MARK,
            )


def _matched(turns: list[WrittenTurn], own: list[Reference], given: list[Reference]) -> list[Reference]:
    """The images in the order of the marks. If the numbers differ, all images that the row names."""
    waiting = sum(image is None for turn in turns for image in turn.images)
    if given and own and not waiting:
        if [image.name for image in given] != [image.name for image in own]:
            raise RowError(
                "the row's turns and its own field name different images; keep those that are right"
            )
        for image, same in zip(own, given, strict=True):
            image.slots += same.slots
        return own
    if waiting != len(given):
        return [*own, *given]
    rest = iter(given)
    return [next(rest) if image is None else image for turn in turns for image in turn.images]


def _require_nothing_unread(row: Mapping[str, object], turns: list[WrittenTurn]) -> None:
    """Refuse a row that would count as text only although something in it looks like an image or a video.

    Raises:
        RowError: The row seems to hold an unread image, or video or audio.
    """
    fields = {key: value for key, value in row.items() if key not in dict(LAYOUTS)}
    for holder in (fields, *(_beside_text(turn) for turn in turns)):
        if found := unread_media(holder):
            raise other_media(found)
        if found := unread_image(holder):
            raise RowError(
                f"{found} under a name that is not read, and a row is never taken without its image; rename "
                "the field to `images`",
                RejectionReason.UNREAD_IMAGE,
            )
    for turn in turns:
        if turn.role == "user" and (named := NAMED_IN_TEXT.search(turn.text)):
            raise RowError(
                f"a user turn shows the image {shorten(named[0], 80)}, which is not read from there; name it "
                f"in `images` and put {IMAGE_MARK} in its place",
                RejectionReason.UNREAD_IMAGE,
            )


def _beside_text(turn: WrittenTurn) -> dict[str, object]:
    said = ("role", "from", "content", "value")
    return {key: value for key, value in (turn.fields or {}).items() if key not in said}


def plain(value: object) -> object:
    """A decoded value with its numbers as Python numbers, for fields that are passed on."""
    match value:
        case Number():
            return _number(value.text)
        case list():
            return [plain(item) for item in value]
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case _:
            return value


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)
