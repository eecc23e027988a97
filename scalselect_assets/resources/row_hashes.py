"""Hashes that a table of vectors carries, so that a changed byte is noticed in whatever part of it is read.

Vectors are read row by row and in parts, so each row has a hash, in a column of its own, of its vector, its
number and its names. The other columns are always read whole, so each has one hash, in the table's schema.
Costs: one pass of SHA-256 over the data read, about a second for each gigabyte, and 16 bytes a row.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

ROW_HASH = "row_sha256"
NAMED = ("row", "sample_key", "source_id")
"""The columns that a row's hash covers beside the vector."""

COLUMN_HASHES = b"scalselect.column_sha256"
_BYTES = 16


class ChangedRowsError(ValueError):
    """Rows differ from those written."""


def row_hashes(
    rows: Sequence[int],
    sample_keys: Sequence[str],
    source_ids: Sequence[str | None],
    vectors: NDArray[np.float32],
) -> pa.Array:
    """The hash of each of (n, d) vectors with its row number and names."""
    contiguous = np.ascontiguousarray(vectors)
    return pa.array(
        [
            _row_hash(row, key, source_id, vector)
            for row, key, source_id, vector in zip(rows, sample_keys, source_ids, contiguous, strict=True)
        ],
        pa.binary(),
    )


def check_rows(rows: pa.RecordBatch | pa.Table, vectors: NDArray[np.float32]) -> None:
    """Compare rows that were read with their hashes.

    Args:
        rows: Columns `NAMED` and `ROW_HASH`.
        vectors: (n, d) of these rows.

    Raises:
        ChangedRowsError: A row differs from the one written.
    """
    named = [rows.column(name).to_pylist() for name in NAMED]
    found = row_hashes(named[0], named[1], named[2], vectors)
    for row, is_hash, was_hash in zip(
        named[0], found.to_pylist(), rows.column(ROW_HASH).to_pylist(), strict=True
    ):
        if is_hash != was_hash:
            raise ChangedRowsError(f"row {row} is not what was written")


def with_column_hashes(table: pa.Table) -> dict[bytes, bytes]:
    """The metadata of a table's schema, with the hash of each column but the vectors."""
    ordered = table.drop_columns([name for name in ("vector", ROW_HASH) if name in table.column_names])
    ordered = ordered.sort_by("row")
    hashes = {name: _column_hash(ordered.column(name)) for name in ordered.column_names}
    return {**(table.schema.metadata or {}), COLUMN_HASHES: json.dumps(hashes, sort_keys=True).encode()}


def check_columns(rows: pa.Table, metadata: Mapping[bytes, bytes]) -> None:
    """Compare whole columns, in the order of ``row``, with the hashes in the metadata of their table.

    A table that was written before there were hashes passes.

    Raises:
        ChangedRowsError: A column differs from the one written.
    """
    if COLUMN_HASHES not in metadata:
        return
    hashes: dict[str, str] = json.loads(metadata[COLUMN_HASHES])
    for name in rows.column_names:
        if name in hashes and _column_hash(rows.column(name)) != hashes[name]:
            raise ChangedRowsError(f"its column {name!r} is not what was written")


def content_hash(
    rows: Sequence[int],
    sample_keys: Sequence[str],
    source_ids: Sequence[str | None],
    vectors: NDArray[np.float32],
    attributes: Mapping[str, pa.Array],
) -> str:
    """The hash of everything in a table. It also changes if rows only move or are renamed."""
    values = [list(rows), list(sample_keys), list(source_ids)]
    named = {name: array.to_pylist() for name, array in attributes.items()}
    digest = hashlib.sha256(json.dumps([values, named], sort_keys=True).encode())
    digest.update(np.ascontiguousarray(vectors).data)
    return digest.hexdigest()


def _row_hash(row: int, sample_key: str, source_id: str | None, vector: NDArray[np.float32]) -> bytes:
    sha256 = hashlib.sha256(json.dumps([int(row), sample_key, source_id]).encode())
    sha256.update(vector.data)
    return sha256.digest()[:_BYTES]


def _column_hash(column: pa.ChunkedArray) -> str:
    sha256 = hashlib.sha256()
    for part in _parts(column.combine_chunks()):
        sha256.update(len(part).to_bytes(8, "little"))
        sha256.update(part)
    return sha256.hexdigest()


def _parts(array: Any) -> list[Any]:
    """The values of a column as bytes, the same on every machine and however Arrow lays them out."""
    if isinstance(array, pa.ChunkedArray):  # of a table without rows
        array = pa.array([], array.type)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        lengths = pc.fill_null(pc.list_value_length(array), -1).cast(pa.int64())
        return [*_numbers(lengths), *_parts(array.flatten())]
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        lengths = pc.fill_null(pc.binary_length(array), -1).cast(pa.int64())
        texts = array.drop_null().to_pylist()
        return [*_numbers(lengths), "".join(texts).encode()]
    return [*_numbers(array.is_valid()), *_numbers(pc.fill_null(array, pa.scalar(0).cast(array.type)))]


def _numbers(array: Any) -> list[bytes]:
    values = array.to_numpy(zero_copy_only=False)
    return [values.astype(values.dtype.newbyteorder("<")).tobytes()]
