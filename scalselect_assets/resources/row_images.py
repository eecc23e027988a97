"""The places where a row names its images: fields of many names, parts of a turn, and its text.

Every image is a `Reference` with all the places that name it, so that it can be renamed in place. The module
also defines the marks that other models write for an image, and the signs of media that are not read.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scalselect_assets.method.representation.conversation import IMAGE
from scalselect_assets.method.representation.rejection import RejectionReason
from scalselect_assets.resources.written_json import kind_of, shorten

IMAGE_MARK = IMAGE.value

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jpeg", ".jpg"),
    *(".png", ".ppm", ".svg", ".tif", ".tiff", ".webp"),
)
MEDIA_SUFFIXES = (
    *(".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"),
    *(".aac", ".flac", ".m4a", ".mp3", ".ogg", ".opus", ".wav"),
)
STANDARD_FIELDS = ("images", "image")
OTHER_FIELDS = (
    *("image_path", "image_paths", "image_file", "image_files", "image_url", "image_urls", "image_list"),
    *("img", "imgs", "img_path", "img_paths", "jpg", "jpeg", "png", "webp"),
)
"""Other names for `images` in some pools; read only if a row has no standard field."""

MEDIA_FIELDS = tuple(
    f"{kind}{ending}"
    for kind in ("video", "audio")
    for ending in ("", "s", "_path", "_paths", "_file", "_files", "_url", "_urls")
)
_REFERENCE_KEYS = ("path", "url", "image")
_OTHER_FIELDS, _MEDIA_FIELDS = frozenset(OTHER_FIELDS), frozenset(MEDIA_FIELDS)

IMAGES_IN_TEXT = re.compile(
    r"\(?<image>\./</image>\)?"  # MiniCPM-V, whose processor puts the mark itself there
    r"|(?P<mark><image>)"
    r"|<img>(?P<named>[^<>\n]*?\S[^<>\n]*?)</img>"  # Qwen-VL
)
"""The images of a text in their order: marks, and images that are named in the text itself."""

FOREIGN_MARKS = re.compile(
    r"<\|vision_start\|>\s*<\|image_pad\|>\s*<\|vision_end\|>"
    r"|<\|begin_of_image\|>\s*(?:<\|image\|>|<\|endoftext\|>)?\s*<\|end_of_image\|>"
    r"|<\|(?:image|image_pad|image_start|image_placeholder|img|vision_start)\|>"
    r"|<\|?(?:image|img|Image|IMAGE|Img|IMG)[ _-]?(?P<number>\d+)\|?>"
    r"|<(?:Image|IMAGE|IMG|Img)>|\[(?:IMG|IMAGE)\]"
    r"|<(?:ImageHere|IMG_CONTEXT|image_placeholder|image_token|image_soft_token|start_of_image)>"
)
OTHER_MEDIA_MARKS = re.compile(
    r"<(?:video|audio|sound|speech)>|<\|(?:video|audio|video_pad|audio_pad|VIDEO|AUDIO)\|>"
    r"|<(?:video|audio)[ _-]?\d+>"
)


def may_hold_marks(text: str) -> bool:
    """Whether a text may match one of the patterns above apart from plain marks; most texts do not."""
    return "<" in text.replace(IMAGE_MARK, "") or "[IM" in text or "<image>./" in text


_IMAGE_NAME = "(?:{})".format("|".join(re.escape(suffix) for suffix in IMAGE_SUFFIXES))
NAMED_IN_TEXT = re.compile(
    rf"!\[[^\]\n]*\]\((?P<markdown>[^)\s]+{_IMAGE_NAME})\)"
    rf"|<img\s[^>]*src\s*=\s*[\"']?(?P<html>[^\"'>\s]+{_IMAGE_NAME})",
    re.IGNORECASE,
)


class RowError(ValueError):
    """The row cannot be a sample; the message is the rejection's detail."""

    def __init__(self, detail: str, reason: RejectionReason = RejectionReason.MALFORMED_ROW) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Slot:
    """One place in a decoded row that names an image: a member, or a span of a member's text."""

    holder: Any
    key: Any
    span: tuple[int, int] | None = None

    def put(self, name: str) -> None:
        """Write another name in this place. With several spans in one text, start with the last."""
        if self.span is None:
            self.holder[self.key] = name
        else:
            text, (start, end) = self.holder[self.key], self.span
            self.holder[self.key] = f"{text[:start]}{name}{text[end:]}"


@dataclass(slots=True)
class Reference:
    """One image: its name as written, and every place that names it."""

    name: str
    slots: list[Slot] = field(default_factory=list)


def references_of(holder: Mapping[str, object], name: str) -> list[Reference]:
    """The images that a field names: a path, an object with one, or a list of either.

    Raises:
        RowError: The field holds something else.
    """
    value = holder[name]
    if isinstance(value, list):
        return [_reference(item, Slot(value, place), name) for place, item in enumerate(value)]
    return [_reference(value, Slot(holder, name), name)]


def _reference(value: object, slot: Slot, name: str) -> Reference:
    if isinstance(value, dict):
        # A table's export writes null for a key that a row lacks.
        key = next((key for key in _REFERENCE_KEYS if value.get(key) not in (None, "")), None)
        if key is not None:
            return _reference(value[key], Slot(value, key), name)
        if value.get("bytes") is not None:
            msg = f"`{name}` holds bytes that are not Base64; write them as Base64 or refer to a file"
            raise RowError(msg)
    if not isinstance(value, str) or not value:
        verb = "holds" if isinstance(slot.holder, list) else "is"
        msg = (
            f"`{name}` {verb} {kind_of(value)}; give a path, an object with a `path`, or a list of them, "
            "none empty"
        )
        raise RowError(msg)
    return Reference(value, [slot])


def images_of(holder: Mapping[str, object], where: str, *, any_name: bool = True) -> list[Reference]:
    """The images that the fields of a row or a turn name.

    Args:
        holder: The row or the turn.
        where: Name of the row or turn in messages.
        any_name: Whether `OTHER_FIELDS` are read if there is no standard field.

    Raises:
        RowError: Two fields name different images, or a field holds something else than images.
    """
    found = {
        name: references_of(holder, name)
        for name in STANDARD_FIELDS
        if holder.get(name) not in (None, "", [])
    }
    if found or not any_name:
        return _agreed(found, where, RejectionReason.MALFORMED_ROW)
    if _OTHER_FIELDS.isdisjoint(holder):
        return []
    found = {
        name: references_of(holder, name)
        for name in OTHER_FIELDS
        if isinstance(value := holder.get(name), str | dict | list) and value not in ("", {}, [])
    }
    return _agreed(found, where, RejectionReason.UNREAD_IMAGE)


def _agreed(found: Mapping[str, list[Reference]], where: str, reason: RejectionReason) -> list[Reference]:
    if not found:
        return []
    first, *others = found.values()
    for other in others:
        if [one.name for one in other] != [one.name for one in first]:
            names = " and ".join(f"`{name}`" for name in found)
            msg = f"the {where}'s {names} name different images; keep the one that is right"
            raise RowError(msg, reason)
        for one, same in zip(first, other, strict=True):
            one.slots += same.slots
    return first


def require_no_other_media(holder: Mapping[str, object], where: str) -> None:
    """Refuse a row or turn that has video or audio.

    Raises:
        RowError: The row or turn has such media; ``other_media`` makes the error.
    """
    if _MEDIA_FIELDS.isdisjoint(holder):
        return
    for name in MEDIA_FIELDS:
        if holder.get(name) not in (None, "", [], {}):
            raise other_media(f"the {where} has `{name}`")


def other_media(found: str) -> RowError:
    """The rejection of a row with video or audio."""
    return RowError(
        f"{found}; images are the only media that are read, and a row is never taken without its media: "
        "leave it out of the pool and add it to the training mix after the selection",
        RejectionReason.OTHER_MEDIA,
    )


def unread_image(holder: Mapping[str, object]) -> str | None:
    """Describe a field that looks like an unread image in a row or turn without images, or return None."""
    for name, value in holder.items():
        for text in _strings(value):
            if _looks_like(text, IMAGE_SUFFIXES) or text[:11].lower() == "data:image/":
                return f"`{name}` seems to name an image ({shorten(text, 60)})"
    return None


def unread_media(holder: Mapping[str, object]) -> str | None:
    """Describe a field that looks like video or audio in a row without an image, or return None."""
    for name, value in holder.items():
        if any(_looks_like(text, MEDIA_SUFFIXES) for text in _strings(value)):
            return f"`{name}` seems to name video or audio"
    return None


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (item for key in _REFERENCE_KEYS if isinstance(item := value.get(key), str))
    elif isinstance(value, list):
        for item in value:
            if not isinstance(item, list):
                yield from _strings(item)


def _looks_like(text: str, suffixes: Sequence[str]) -> bool:
    """Whether a string is one file name with one of these suffixes, or the address of an embedded one."""
    path = text.split("?", 1)[0].lower()
    named = path.endswith(tuple(suffixes)) and "\n" not in text and len(text) < 1000
    return named or (suffixes is IMAGE_SUFFIXES and ADDRESS.fullmatch(text) is not None)


ADDRESS = re.compile(r"(?s)(?P<shard>.+\.(?:[A-Za-z0-9]+))#(?P<row>\d{1,18})/(?P<place>\d{1,9})")
"""The address of an image inside a shard: the shard's path, ``#``, its row and its place in the row."""
