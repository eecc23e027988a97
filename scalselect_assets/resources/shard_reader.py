"""Streaming split of a text shard's bytes into the verbatim JSON texts of its rows.

A text shard is a JSON array of rows or JSON Lines, in UTF-8; the first character decides which, never the
file's name. A file that is neither raises ``ShardFormatError``; in JSON Lines a broken line is still a row,
so that one bad line costs one row and not the shard. `samples` reads the meaning of a row, and
`forms` knows the other forms of shard.

Memory: a few chunks, or a few times the longest row where that is more.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn, TypeAlias

from upath import UPath

Container: TypeAlias = Literal["array", "lines"]

CHUNK_BYTES = 1 << 20
LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".jl")

_MAX_LEADING_SPACE = 1 << 20

LFS_POINTER = b"version https://git-lfs"

MAX_ROW_LENGTH = 1 << 26
"""A row longer than this (64 Mi characters or bytes) is a missing bracket or newline, not a conversation."""

_BOM = codecs.BOM_UTF8
_JSON_SPACE = " \t\r\n"
_JSON_SPACE_BYTES = _JSON_SPACE.encode()
_SPACE = re.compile(rf"[{_JSON_SPACE}]*")

_CUT_MARGIN = 16
"""Longer than any token that a chunk's end can cut so that it reads as another one (``-Infinity``, ``1e+5``,
``\\ud83d``): nearer to the end than this, the cut may have caused an error or a seemingly complete value."""

# Numbers stay text: a long integer must not meet Python's digit limit when only the row's extent is wanted.
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str)


class ShardFormatError(ValueError):
    """A file is not what it claims to be: neither a JSON array of rows nor JSON Lines."""


@dataclass(frozen=True, slots=True)
class RowText:
    """One row as the file has it."""

    row: int
    """Place in the shard, from 0; broken rows count, blank lines do not."""
    text: str
    """The row's JSON text verbatim, without the space or comma around it."""
    line: int
    """Line of the file on which the row starts, from 1."""
    error: str | None = None
    """The reason why ``text`` differs from the file, and the remedy; None if it does not differ."""
    images: tuple[bytes, ...] = ()
    """The images embedded in the row, in the order of the addresses in ``text``."""


@dataclass(frozen=True, slots=True)
class SplitResult:
    """The files and the number of rows that ``split_shard`` wrote."""

    files: tuple[Path, ...]
    n_rows: int


def iter_rows(path: UPath, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[RowText]:
    """Every row of a shard file, in order.

    Args:
        path: The file.
        chunk_bytes: Number of bytes read at a time.

    Yields:
        Rows as they are read. When the iteration raises, the rows already given belong to a broken file.

    Raises:
        ShardFormatError: The file is not a JSON array or JSON Lines, or an array is broken somewhere.
        OSError: The file cannot be read.
    """
    with path.open("rb") as stream:
        yield from rows_of(read_chunks(stream, chunk_bytes), path)


def read_chunks(stream: BinaryIO, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The bytes of ``stream``, ``chunk_bytes`` at a time."""
    while chunk := stream.read(chunk_bytes):
        yield chunk


def rows_of(chunks: Iterator[bytes], path: UPath) -> Iterator[RowText]:
    """``iter_rows`` for bytes that the caller reads; ``path`` only names them in messages.

    Raises:
        ShardFormatError: The bytes are not readable as rows, as in ``iter_rows``.
    """
    kind, body = recognise(chunks, path)
    if kind == "array":
        yield from _array_rows(body, path)
        return
    for row, (line, data) in enumerate(_line_rows(body, path)):
        try:
            yield RowText(row, data.decode(), line)
        except UnicodeDecodeError as error:
            found = (
                f"byte 0x{data[error.start]:02x} after {error.start} bytes of the row is not UTF-8; save the "
                "file as UTF-8"
            )
            yield RowText(row, data.decode(errors="backslashreplace"), line, error=found)


def split_shard(
    path: UPath, rows_per_shard: int, out: Path, *, chunk_bytes: int = CHUNK_BYTES
) -> SplitResult:
    """Cut one file into shards ``<stem>-00000.json`` (an array) or ``.jsonl`` (lines), rows verbatim.

    The shards appear only when the whole file has been read: until then they have hidden temporary names, so
    that neither a broken file nor a crash leaves part of a pool behind.

    Args:
        path: The file to cut.
        rows_per_shard: Rows in every shard but the last, at least 1.
        out: Folder for the shards; made when absent.
        chunk_bytes: Number of bytes read at a time.

    Returns:
        The shards in order, and the number of rows in all. A file without rows gives no shard.

    Raises:
        ValueError: ``rows_per_shard`` is below 1.
        FileExistsError: ``out`` already holds shards of this name.
        ShardFormatError: The file is not readable as rows, as in ``iter_rows``; nothing is written.
    """
    if rows_per_shard < 1:
        msg = f"Got rows_per_shard={rows_per_shard}; a shard has at least 1 row. Give a positive number."
        raise ValueError(msg)
    out.mkdir(parents=True, exist_ok=True)
    shard_name = re.compile(re.escape(path.stem) + r"-\d{5,}\.json.*", re.DOTALL)
    if taken := sorted(entry.name for entry in out.iterdir() if shard_name.fullmatch(entry.name)):
        msg = (
            f"{out} already holds {len(taken)} shard(s) of {path.stem!r}, the first being {taken[0]!r}; "
            f"shards are never overwritten. Remove them or choose another folder."
        )
        raise FileExistsError(msg)

    parts: list[tuple[Path, Path]] = []
    n_rows = 0
    try:
        with path.open("rb") as stream:
            kind, body = recognise(read_chunks(stream, chunk_bytes), path)
            rows = (
                (row.text.encode() for row in _array_rows(body, path))
                if kind == "array"
                else (data for _, data in _line_rows(body, path))
            )
            before, between, after, suffix = (
                (b"[\n", b",\n", b"\n]\n", ".json") if kind == "array" else (b"", b"\n", b"\n", ".jsonl")
            )
            for first in rows:
                name = f"{path.stem}-{len(parts):05d}{suffix}"
                parts.append((out / f".{name}.partial", out / name))
                with parts[-1][0].open("wb") as part:
                    part.write(before + first)
                    n_rows += 1
                    for data in islice(rows, rows_per_shard - 1):
                        part.write(between + data)
                        n_rows += 1
                    part.write(after)
        for partial, final in parts:
            partial.rename(final)
    finally:
        for partial, _ in parts:
            partial.unlink(missing_ok=True)
    return SplitResult(tuple(final for _, final in parts), n_rows)


def _refuse(path: UPath, found: str, remedy: str) -> NoReturn:
    msg = f"{path}: {found}. A shard is a JSON array of rows or JSON Lines, in UTF-8. {remedy}"
    raise ShardFormatError(msg)


def recognise(chunks: Iterator[bytes], path: UPath) -> tuple[Container, Iterator[bytes]]:
    """The container of the content, and its chunks without a byte order mark.

    Raises:
        ShardFormatError: The content is neither a JSON array nor JSON Lines.
    """
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= len(_BOM):
            break
    # Each chunk is looked at once, however much white space comes before the first row.
    pieces = [head.removeprefix(_BOM)]
    start, size = pieces[0].lstrip(_JSON_SPACE_BYTES), len(pieces[0])
    while not start and (chunk := next(chunks, b"")):
        pieces.append(chunk)
        start, size = chunk.lstrip(_JSON_SPACE_BYTES), size + len(chunk)
        if not start and size > _MAX_LEADING_SPACE:
            found = f"the file begins with more than {_MAX_LEADING_SPACE} bytes of white space"
            _refuse(path, found, "Remove it.")
    if not start and not _claims_lines(path):
        _refuse(
            path, "the file is empty", "Write the rows again; an empty shard is [] or an empty .jsonl file."
        )
    if start.startswith(LFS_POINTER):
        found = "the file is a Git LFS pointer: the repository was cloned without its large files"
        _refuse(path, found, "Run `git lfs pull` in it.")
    if start and start[:1] not in (b"[", b"{"):
        found = f"the file begins with {start[:16]!r}"
        _refuse(path, found, "Convert the file, or move it out of the pool.")
    return "array" if start[:1] == b"[" else "lines", chain(filter(None, pieces), chunks)


def _claims_lines(path: UPath) -> bool:
    """Whether the name says JSON Lines, compressed or not."""
    return any(suffix.lower() in LINES_SUFFIXES for suffix in path.suffixes[-2:])


# ---------------------------------------------------------------------------------------------- JSON Lines


def _line_rows(chunks: Iterator[bytes], path: UPath) -> Iterator[tuple[int, bytes]]:
    """Line number and bytes of every line that is not blank.

    Raises:
        ShardFormatError: At the end, when the file turns out to be one JSON object.
    """
    n_rows = 0
    any_sample = False
    first_is_json = True
    for line, raw in enumerate(_lines(chunks, path), start=1):
        data = raw.strip(_JSON_SPACE_BYTES)
        if not data:
            continue
        if not any_sample:
            is_json, any_sample = _look_at(data)
            if n_rows == 0:
                first_is_json = is_json
        n_rows += 1
        yield line, data
    # A pretty-printed object may have whole objects, such as turns, on lines of their own. It differs from
    # JSON Lines in two ways: its first line is only a beginning, and no line is a row with turns.
    if n_rows and not any_sample and not (first_is_json and _claims_lines(path)):
        _refuse(
            path,
            f"the file is a JSON object over {n_rows} line(s), none of which is a row with `messages` or "
            "`conversations`",
            "Put the rows in an array or each on its own line; move a file without rows out of the pool.",
        )


def _look_at(data: bytes) -> tuple[bool, bool]:
    """Whether a line is JSON, and whether it is an object that holds turns.

    A comma at the end makes the row malformed, but the file still counts as JSON Lines.
    """
    try:
        value = _DECODER.decode(data.decode().rstrip(f",{_JSON_SPACE}"))
    except (ValueError, RecursionError):
        return False, False
    return True, isinstance(value, dict) and ("messages" in value or "conversations" in value)


def _lines(chunks: Iterable[bytes], path: UPath) -> Iterator[bytes]:
    """The lines between newline bytes (U+2028 and the like may stand inside a JSON string)."""
    rest: list[bytes] = []
    length = 0
    for line, chunk in _numbered(chunks):
        *whole, tail = chunk.split(b"\n")
        if whole:
            yield b"".join([*rest, whole[0]])
            yield from whole[1:]
            rest, length = [], 0
        rest.append(tail)
        length += len(tail)
        if length > MAX_ROW_LENGTH:
            found = f"line {line + len(whole)} is longer than {MAX_ROW_LENGTH} bytes"
            _refuse(path, found, "Put one row on each line.")
    yield b"".join(rest)


def _numbered(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Each chunk with the number of the line on which it starts."""
    line = 1
    for chunk in chunks:
        yield line, chunk
        line += chunk.count(b"\n")


# ---------------------------------------------------------------------------------------------- JSON array


def _array_rows(chunks: Iterator[bytes], path: UPath) -> Iterator[RowText]:
    """The elements of the array that the chunks hold.

    Raises:
        ShardFormatError: The array is broken, is not closed, or is not the only thing in the file.
    """
    window = _Window(chunks, path)
    window.skip_space()
    window.advance(window.position + 1)
    row = 0
    closed = window.skip_space() == "]"
    while not closed:
        window.skip_space()
        end = _row_end(window, row)
        yield RowText(row, window.text[window.position : end], window.line)
        window.advance(end)
        following = window.skip_space()
        if following == "":
            _refuse_unclosed(window, f"after row {row}")
        if following not in ",]":
            found = f"line {window.line} has {following!r} after row {row}, where a comma or ] is due"
            _refuse(path, found, "Correct that place.")
        closed = following == "]"
        if not closed:
            window.advance(window.position + 1)
        row += 1
    window.advance(window.position + 1)
    if window.skip_space():
        rest = window.text[window.position : window.position + 16]
        found = f"line {window.line} goes on with {rest!r} after the end of the array"
        _refuse(path, found, "Keep one array to a file.")


def _row_end(window: "_Window", row: int) -> int:
    """The end, in ``window.text``, of the row that starts at ``window.position``."""
    while True:
        try:
            _, end = _DECODER.raw_decode(window.text, window.position)
        except json.JSONDecodeError as error:
            # An unterminated string is reported where it starts, so its place says nothing about the cut.
            may_be_cut = error.msg.startswith("Unterminated string") or window.near_end(error.pos)
            if window.ended or not may_be_cut:
                line = window.line + window.text.count("\n", window.position, error.pos)
                if may_be_cut and not window.text.rstrip(_JSON_SPACE).endswith("]"):
                    _refuse_unclosed(window, f"inside row {row}, which starts on line {window.line}")
                found = f"line {line} is not JSON: {error.msg} (row {row}, from line {window.line})"
                _refuse(window.path, found, "Correct that place.")
        except RecursionError:
            found = f"row {row} on line {window.line} is nested too deeply to be read"
            _refuse(window.path, found, "Remove that row.")
        else:
            if window.ended or not window.near_end(end):
                return end
        if len(window.text) - window.position > MAX_ROW_LENGTH:
            found = f"row {row} on line {window.line} does not end within {MAX_ROW_LENGTH} characters"
            _refuse(window.path, found, "Look for a missing bracket or quote in that row.")
        window.grow()


def _refuse_unclosed(window: "_Window", where: str) -> NoReturn:
    last_line = window.line + window.text.count("\n", window.position)
    found = f"the array is not closed: the file ends on line {last_line}, {where}"
    _refuse(window.path, found, "Copy the file again; this one looks cut off.")


class _Window:
    """The text of a file from a moving position on.

    ``grow`` at least doubles what lies ahead, so that a row over many chunks is decoded again a logarithmic
    number of times and its cost stays linear.
    """

    def __init__(self, chunks: Iterator[bytes], path: UPath) -> None:
        self.path = path
        self.text = ""
        self.position = 0
        self.line = 1
        self.ended = False
        self._chunks = chunks
        self._decode: Callable[[bytes, bool], str] = codecs.getincrementaldecoder("utf-8")().decode

    def near_end(self, index: int) -> bool:
        """Whether ``index`` is so near the end of the text read so far that the cut may matter there."""
        return index > len(self.text) - _CUT_MARGIN

    def advance(self, index: int) -> None:
        """Move on to ``index``, keeping count of the lines."""
        self.line += self.text.count("\n", self.position, index)
        self.position = index

    def skip_space(self) -> str:
        """Move to the next character that is no space and return it, or "" at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.position)
            self.advance(match.end() if match else self.position)
            if self.position < len(self.text):
                return self.text[self.position]
            if self.ended:
                return ""
            self.grow()

    def grow(self) -> None:
        """Drop the text behind the position and read at least as much as lies ahead."""
        pieces = [self.text[self.position :]]
        wanted = max(1, len(pieces[0]))
        while wanted > 0 and not self.ended:
            chunk = next(self._chunks, b"")
            self.ended = not chunk
            try:
                pieces.append(self._decode(chunk, self.ended))
            except UnicodeDecodeError as error:
                line = self.line + sum(piece.count("\n") for piece in pieces)
                line += error.object.count(b"\n", 0, error.start)
                found = f"line {line} holds byte 0x{error.object[error.start]:02x}, which is not UTF-8"
                _refuse(self.path, found, "Save the file as UTF-8.")
            wanted -= len(pieces[-1])
        self.text = "".join(pieces)
        self.position = 0
