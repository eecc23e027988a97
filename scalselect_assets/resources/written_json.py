"""JSON in a row's own spelling: numbers stay as written, and one value can be replaced alone.

Holds the decoder for rows, its inverse, and the places of an object's members. `row_layout` reads
the meaning of the values.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

_BETWEEN = re.compile(r"[ \t\r\n,:]*")


class NotJsonError(ValueError):
    """The text is not JSON, or is nested too deeply; the message says what and what to do."""


@dataclass(frozen=True, slots=True)
class Number:
    """A JSON number as written: ids keep their spelling, and no digit limit or overflow applies."""

    text: str


_DECODER = json.JSONDecoder(parse_int=Number, parse_float=Number, parse_constant=Number)


def decode(text: str) -> object:
    """The value in ``text``, with its numbers as `Number`.

    Raises:
        NotJsonError: The text is not JSON, or is nested too deeply.
    """
    try:
        value: object = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise NotJsonError(_fault(text, error)) from error
    except RecursionError as error:
        msg = "the row is nested too deeply to be read; write a flat list of turns"
        raise NotJsonError(msg) from error
    return value


def _fault(text: str, error: json.JSONDecodeError) -> str:
    if error.msg == "Extra data" and not text[error.pos :].strip(", \t\r\n"):
        return (
            f"the row ends with a comma (at character {error.pos}); JSON Lines has one object per line and "
            "nothing between them: remove the comma, or put [ before the first row and ] after the last"
        )
    return f"the row is not valid JSON: {error.msg} at character {error.pos}; write it again as JSON"


def encode(value: object) -> str:
    """``value`` as JSON text, numbers as they were written.

    Raises:
        RecursionError: The value is nested too deeply.
    """
    pieces: list[str] = []
    _write(value, pieces)
    return "".join(pieces)


def _write(value: object, pieces: list[str]) -> None:
    """Append the JSON of ``value``; each piece is written once, however deep it lies."""
    match value:
        case Number():
            pieces.append(value.text)
        case list():
            pieces.append("[")
            for place, item in enumerate(value):
                pieces.append(", " if place else "")
                _write(item, pieces)
            pieces.append("]")
        case dict():
            pieces.append("{")
            for place, (key, item) in enumerate(value.items()):
                pieces.append(f"{', ' if place else ''}{json.dumps(key, ensure_ascii=False)}: ")
                _write(item, pieces)
            pieces.append("}")
        case _:
            pieces.append(json.dumps(value, ensure_ascii=False))


_CANONICAL = json.JSONEncoder(
    ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=lambda number: f"\0{number.text}"
)


def canonical(value: object) -> str:
    """A text shared only by equal values; the order of members does not matter.

    Raises:
        RecursionError: The value is nested too deeply.
    """
    return _CANONICAL.encode(value)


def members(text: str) -> Iterator[tuple[str, object, int, int]]:
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


def kind_of(value: object) -> str:
    """The kind of a JSON value, in words."""
    match value:
        case None:
            return "null or absent"
        case bool():
            return "a boolean"
        case Number():
            return f"the number {value.text[:40]}"
        case str():
            return f"the string {shorten(value)}"
        case list():
            return f"a list of {len(value)}"
        case _:
            return "an object"


def shorten(text: str, limit: int = 120) -> str:
    """``text`` quoted for a message, cut where it is longer than a message should be (embedded images)."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}... ({len(text)} characters)"
