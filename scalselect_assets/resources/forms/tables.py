"""Parquet files and saved Hugging Face ``datasets`` (Arrow), with images as bytes or as paths.

A row becomes a JSON object of its columns that are not null. A cell with bytes, be it binary or the struct of
bytes and path that ``datasets`` writes, becomes an address. Row groups stream: memory of a batch of rows, and
of one page of each column.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from scalselect_assets.resources.forms.embedded import Address, Extraction
from scalselect_assets.resources.forms.form import Digest, ShardFile, read_unpacked
from scalselect_assets.resources.row_images import OTHER_FIELDS, STANDARD_FIELDS
from scalselect_assets.resources.row_layout import LAYOUTS
from scalselect_assets.resources.shard_reader import Container, RowText, ShardFormatError
from scalselect_assets.resources.written_json import NotJsonError, Number, decode, encode

_BATCH_ROWS = 32
_BUFFER_BYTES = 1 << 20
_WRITTEN_AS_JSON = (*dict(LAYOUTS), *STANDARD_FIELDS, *OTHER_FIELDS)
"""Columns that some tables keep as JSON texts."""


class _TableForm:
    """The common part of both kinds of table."""

    name: str
    suffixes: tuple[str, ...]

    def rows(self, file: ShardFile, digest: Digest | None = None) -> Iterator[RowText]:
        """Every row, by the rules of `Form.rows`; a row's line is its number."""
        if digest is not None:
            file.digest(digest)
        number = 0
        try:
            for batch in self._batches(file):
                for row in batch.to_pylist():
                    yield _row_text(row, file.name, number)
                    number += 1
        except (pa.ArrowException, OSError) as error:
            # An error of the file system has a number; one that pyarrow finds in the data has none.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            msg = f"{file}: the file is not {self.name}, or is damaged ({error}). Write or copy it again."
            raise ShardFormatError(msg) from error

    def container(self, file: ShardFile) -> Container:  # noqa: ARG002 - of the protocol
        """A table's rows are written as lines."""
        return "lines"

    def read_image(self, file: ShardFile, version: str, address: Address) -> bytes:
        """An embedded image, by the rules of `Form.read_image`."""
        return read_unpacked(self, file, version, address)

    def _batches(self, file: ShardFile) -> Iterator[pa.RecordBatch]:
        raise NotImplementedError


@dataclass(frozen=True)
class Parquet(_TableForm):
    """A Parquet file."""

    name: str = "Parquet"
    suffixes: tuple[str, ...] = (".parquet", ".pq")

    def _batches(self, file: ShardFile) -> Iterator[pa.RecordBatch]:
        # Reading ahead is off, because a row group may be as large as the file.
        with (
            file.open() as stream,
            pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False) as parquet,
        ):
            _require_turns(parquet.schema_arrow, file)
            yield from parquet.iter_batches(batch_size=_BATCH_ROWS)


@dataclass(frozen=True)
class Arrow(_TableForm):
    """An Arrow file, as ``Dataset.save_to_disk`` writes them: a stream, or else a file with a footer."""

    name: str = "Arrow"
    suffixes: tuple[str, ...] = (".arrow",)

    def _batches(self, file: ShardFile) -> Iterator[pa.RecordBatch]:
        with file.open() as stream:
            has_footer = stream.read(6) == b"ARROW1"
            stream.seek(0)
            if has_footer:
                with pa.ipc.open_file(stream) as arrow:
                    _require_turns(arrow.schema, file)
                    for number in range(arrow.num_record_batches):
                        yield from _small(arrow.get_batch(number))
                return
            with pa.ipc.open_stream(stream) as batches:
                _require_turns(batches.schema, file)
                for batch in batches:
                    yield from _small(batch)


def _small(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for start in range(0, batch.num_rows, _BATCH_ROWS):
        yield batch.slice(start, _BATCH_ROWS)


def _require_turns(schema: pa.Schema, file: ShardFile) -> None:
    turns = list(dict(LAYOUTS))
    if not set(turns) & set(schema.names):
        columns = ", ".join(schema.names[:20]) or "none"
        msg = (
            f"{file}: none of the columns holds turns ({columns}). A table of rows has a column `messages` "
            "or `conversations`: rename it, or move the file out of the pool."
        )
        raise ShardFormatError(msg)


def _row_text(row: dict[str, Any], shard: str, number: int) -> RowText:
    extraction = Extraction(shard, number)
    said = {
        column: extraction.of(_plain(_parsed(column, value)), column)
        for column, value in row.items()
        if value is not None
    }
    return RowText(number, encode(said), number + 1, images=tuple(extraction.images))


def _parsed(column: str, value: Any) -> Any:
    if column in _WRITTEN_AS_JSON and isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return decode(value)
        except NotJsonError:
            return value
    return value


def _plain(value: Any) -> Any:
    """A cell as JSON values, without the nulls that a table puts where a struct lacks a member."""
    match value:
        case dict():
            return {str(key): _plain(item) for key, item in value.items() if item is not None}
        case list() | tuple():
            return [_plain(item) for item in value]
        case None | bool() | int() | float() | str() | bytes() | Number():
            return value
        case _:
            return str(value)


PARQUET = Parquet()
ARROW = Arrow()
