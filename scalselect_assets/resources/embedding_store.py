"""The vectors, in LanceDB: one table per model fingerprint and shard, replaced whole in one commit.

Why not one table: replacing a shard in a shared table either needs memory in proportion to the whole table
or takes two commits, and disjoint shards conflict. With a table each, memory is bounded by the shard, shards
never meet, and a crash leaves the old version or the new one. A reader names the version that a receipt
gives, so that nothing changes under it. There must be one writer per shard; the refresh holds a lock.
Rows carry hashes (`resources.row_hashes`), and rows are compared with them when read; a table from an earlier
release has none and is read as it is.
"""

import errno
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from upath import UPath

from scalselect_assets.resources.files import is_local
from scalselect_assets.resources.names import encode_name
from scalselect_assets.resources.row_hashes import (
    NAMED,
    ROW_HASH,
    check_columns,
    check_rows,
    content_hash,
    row_hashes,
    with_column_hashes,
)

_NOTE_PREFIX = "scalselect.note."
_CONTENT_FIELD = "scalselect.content_sha256"  # in the table's own schema
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust writes it
# System errors that prevent reading a table although the table itself may be sound.
_NOT_THE_TABLE = {
    *(errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
}


class EmbeddingTableError(RuntimeError):
    """A table is missing or differs from its record; the message names the remedy."""

    def __init__(self, message: str, shard: str) -> None:
        super().__init__(message)
        self.shard = shard


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """The record of a committed table, for its readers.

    Attributes:
        fingerprint: Fingerprint of the model that made the vectors.
        shard: The shard's partition key.
        table: Name of the table in LanceDB.
        version: Committed version.
        n_rows: Embedded samples.
        dimension: Length of each vector.
        content_sha256: Hash over all columns in row order.
    """

    fingerprint: str
    shard: str
    table: str
    version: int
    n_rows: int
    dimension: int
    content_sha256: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class VectorBatch:
    """Some rows of a table, in no promised order."""

    row: NDArray[np.int64]
    sample_key: list[str]
    source_id: list[str | None]
    vector: NDArray[np.float32]


@dataclass(frozen=True)
class EmbeddingStore:
    """LanceDB tables below ``folder`` (local or in an object store)."""

    folder: UPath
    storage_options: Mapping[str, str]

    def replace(
        self,
        fingerprint: str,
        shard: str,
        *,
        dimension: int,
        rows: Sequence[int],
        sample_keys: Sequence[str],
        source_ids: Sequence[str | None],
        vectors: NDArray[np.float32],
        attributes: Mapping[str, pa.Array],
        notes: Mapping[str, str] = MappingProxyType({}),
    ) -> EmbeddingTable:
        """Make the table of ``shard`` hold exactly these rows, in one commit.

        Args:
            fingerprint: Fingerprint of the model.
            shard: Partition key, any string.
            dimension: Length d of each vector; needed if there are no rows.
            rows: (n,) row numbers within the shard.
            sample_keys: (n,) unique keys.
            source_ids: (n,) the rows' own ids.
            vectors: (n, d) float32, finite.
            attributes: Further columns, n values each.
            notes: Kept with the table, for ``newest``.

        Raises:
            ValueError: Wrong shape or dtype, a non-finite vector or a repeated key; nothing was written.
            OSError: The disk is full, read-only or not there; the old version stays in force.
        """
        _check_rows(shard, dimension, rows, sample_keys, vectors)
        if len(source_ids) != len(rows):
            raise ValueError(f"shard {shard!r} has {len(rows)} rows but {len(source_ids)} source_ids")
        content_sha256 = content_hash(rows, sample_keys, source_ids, vectors, attributes)
        columns = {
            "row": (pa.array(rows, pa.int64()), False),
            "sample_key": (pa.array(sample_keys, pa.string()), False),
            "vector": (pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dimension), False),
            "source_id": (pa.array(source_ids, pa.string()), True),
            **{name: (array, True) for name, array in attributes.items()},
            ROW_HASH: (row_hashes(rows, sample_keys, source_ids, vectors), False),
        }
        schema = pa.schema(
            [pa.field(name, array.type, nullable=nullable) for name, (array, nullable) in columns.items()],
            metadata={
                "scalselect.shard": shard,
                "scalselect.fingerprint": fingerprint,
                _CONTENT_FIELD: content_sha256,
                **{f"{_NOTE_PREFIX}{name}": note for name, note in notes.items()},
            },
        )
        data = pa.Table.from_arrays([array for array, _ in columns.values()], schema=schema)
        data = data.replace_schema_metadata(with_column_hashes(data))
        name = table_name(fingerprint, shard)
        connection = self._connect()
        try:
            table = connection.create_table(name, data, mode="overwrite")
        except (ValueError, RuntimeError) as error:
            if reported := system_error(error, self.folder / f"{name}.lance"):
                raise reported from error
            if not is_local(self.folder) or _is_whole(connection, name):
                raise
            # LanceDB reads a table before it replaces it, and a power cut may leave one whose last commit is
            # empty. Such a table cannot be read any more.
            connection.drop_table(name)
            table = connection.create_table(name, data)
        return EmbeddingTable(
            fingerprint=fingerprint,
            shard=shard,
            table=name,
            version=table.version,
            n_rows=len(rows),
            dimension=dimension,
            content_sha256=content_sha256,
        )

    def newest(self, fingerprint: str, shard: str) -> tuple[EmbeddingTable, dict[str, str]] | None:
        """The last table of a shard under a model, referred to or not, with its notes; None if there is none.

        A table that cannot be opened counts as none.

        Raises:
            OSError: The system refuses to read it, which says nothing about the table.
        """
        name = table_name(fingerprint, shard)
        if not (self.folder / f"{name}.lance").exists():
            return None
        try:
            handle = self._connect().open_table(name)
            schema = handle.schema
            kept = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
            table = EmbeddingTable(
                fingerprint=fingerprint,
                shard=shard,
                table=name,
                version=handle.version,
                n_rows=handle.count_rows(),
                dimension=schema.field("vector").type.list_size,
                content_sha256=kept[_CONTENT_FIELD],
            )
        except (ValueError, RuntimeError, KeyError) as error:
            refused = system_error(error, self.folder / f"{name}.lance")
            if refused is not None and refused.errno in _NOT_THE_TABLE:
                raise refused from error
            return None
        notes = {
            key.removeprefix(_NOTE_PREFIX): note for key, note in kept.items() if key.startswith(_NOTE_PREFIX)
        }
        return table, notes

    def read(self, table: EmbeddingTable, *, batch_rows: int = 4096) -> Iterator[VectorBatch]:
        """Stream the vectors of the recorded version.

        Raises:
            EmbeddingTableError: The table or the version is gone, is damaged, or differs from the record.
            OSError: The system refuses to read it, which says nothing about the table.
        """
        n_rows = 0
        with self._readable(table):
            handle = self._open(table)
            for batch in handle.search().select(_vector_columns(handle)).limit(None).to_batches(batch_rows):
                n_rows += batch.num_rows
                yield VectorBatch(
                    row=batch.column("row").to_numpy(),
                    sample_key=batch.column("sample_key").to_pylist(),
                    source_id=batch.column("source_id").to_pylist(),
                    vector=_checked_vectors(batch, table.dimension),
                )
        if n_rows != table.n_rows:
            raise EmbeddingTableError(
                f"table {table.table!r} version {table.version} gave {n_rows} rows, recorded were "
                f"{table.n_rows}; materialize attention_embeddings[{table.shard}] again",
                table.shard,
            )

    def read_rows(self, table: EmbeddingTable, columns: Sequence[str]) -> pa.Table:
        """Some columns other than the vectors of the recorded version, sorted by row; raises as ``read``.

        A column that is not there, as in tables that an earlier release has written, is null.
        """
        with self._readable(table):
            handle = self._open(table)
            there = set(handle.schema.names)
            wanted = dict.fromkeys(["row", *(name for name in columns if name in there)])
            rows = handle.search().select(list(wanted)).limit(None).to_arrow().sort_by("row")
            check_columns(rows, handle.schema.metadata or {})
        for name in columns:
            if name not in there:
                rows = rows.append_column(name, pa.nulls(rows.num_rows))
        return rows

    def read_all(self, table: EmbeddingTable) -> pa.Table:
        """Every column of the recorded version, vectors included, in memory; raises as ``read``."""
        with self._readable(table):
            handle = self._open(table)
            rows = handle.search().limit(None).to_arrow().sort_by("row")
            if rows.num_rows != table.n_rows:
                raise ValueError(f"it has {rows.num_rows} rows, recorded were {table.n_rows}")
            _checked_vectors(rows, table.dimension)
            check_columns(rows, handle.schema.metadata or {})
        return rows

    def verify(self, table: EmbeddingTable) -> None:
        """Read everything of the recorded version and compare it with the recorded hash; raises as ``read``.

        This also works for a table from an earlier release, whose rows carry no hashes.
        """
        rows = self.read_all(table)
        own = {"vector", ROW_HASH, *NAMED}
        found = content_hash(
            rows["row"].to_pylist(),
            rows["sample_key"].to_pylist(),
            rows["source_id"].to_pylist(),
            _matrix(rows, table.dimension),
            {name: rows[name] for name in rows.column_names if name not in own},
        )
        with self._readable(table):
            if found != table.content_sha256:
                raise ValueError(f"its rows have hash {found[:12]}, recorded was {table.content_sha256[:12]}")

    def take(self, table: EmbeddingTable, offsets: Sequence[int]) -> NDArray[np.float32]:
        """The vectors at ``offsets``, one or more, of the recorded version, (m, d), in no promised order.

        Raises as ``read``.
        """
        with self._readable(table):
            handle = self._open(table)
            rows = handle.take_offsets(list(offsets)).select(_vector_columns(handle)).to_arrow()
            return _checked_vectors(rows, table.dimension)

    def read_vectors(self, table: EmbeddingTable, rows: Sequence[int]) -> NDArray[np.float32]:
        """The vectors of some rows of the recorded version, by the shard's row numbers.

        Reads the row numbers of the table and the vectors of these rows, no others.

        Args:
            table: The recorded table.
            rows: Row numbers, each once; there may be none.

        Returns:
            (len(rows), d), in the order of ``rows``.

        Raises:
            EmbeddingTableError: The table lacks one of the rows, or ``read`` would raise this error.
            OSError: The system refuses to read it, which says nothing about the table.
        """
        if not len(rows):
            return np.empty((0, table.dimension), np.float32)
        with self._readable(table):
            handle = self._open(table)
            # Offsets are places in the table, which need not be row numbers: rejected rows have none.
            held = handle.search().select(["row"]).limit(None).to_arrow()["row"].to_numpy()
            order = np.argsort(held, kind="stable")
            wanted = np.asarray(rows, dtype=np.int64)
            at = np.searchsorted(held, wanted, sorter=order)
            there = np.append(held[order], -1)[at] == wanted
            if not there.all():
                raise ValueError(f"it has no row {wanted[int(np.argmin(there))]}")
            found = handle.take_offsets(order[at].tolist()).select(_vector_columns(handle)).to_arrow()
            vectors = _checked_vectors(found, table.dimension)
        got = found["row"].to_numpy()
        # LanceDB returns the vectors in no promised order.
        place = np.argsort(got, kind="stable")[np.argsort(np.argsort(wanted, kind="stable"), kind="stable")]
        ordered: NDArray[np.float32] = vectors[place]
        return ordered

    def location(self, table: EmbeddingTable) -> UPath:
        """The folder in which LanceDB keeps a table."""
        return self.folder / f"{table.table}.lance"

    def table_names(self) -> set[str]:
        """The tables that exist, of all shards and models; LanceDB keeps each as the folder ``<name>.lance``.

        Listing the folders spares a refresh without work the seconds that importing LanceDB takes.
        """
        return {path.stem for path in self.folder.iterdir()} if self.folder.exists() else set()

    def _open(self, table: EmbeddingTable) -> Any:
        handle = self._connect().open_table(table.table)
        handle.checkout(table.version)
        # A table that was dropped and made again counts its versions from one again.
        held = (handle.schema.metadata or {}).get(_CONTENT_FIELD.encode(), b"").decode()
        if held != table.content_sha256:
            raise ValueError(f"it holds content {held[:12]}, recorded was {table.content_sha256[:12]}")
        return handle

    @contextmanager
    def _readable(self, table: EmbeddingTable) -> Iterator[None]:
        try:
            yield
        # LanceDB reports a missing table and a missing version as ValueError, and damaged ones, whose rows
        # it only meets on the way, as RuntimeError; vectors of another length do not fit the recorded shape.
        except (ValueError, RuntimeError, OSError) as error:
            refused = system_error(error, self.folder / f"{table.table}.lance")
            if refused is not None and refused.errno in _NOT_THE_TABLE:
                raise refused from error
            raise EmbeddingTableError(
                f"table {table.table!r} version {table.version} in {self.folder} cannot be read ({error}); "
                f"materialize attention_embeddings[{table.shard}] again",
                table.shard,
            ) from error

    def _connect(self) -> Any:
        import lancedb

        # Otherwise a handle keeps its snapshot, and a stale one silently duplicates or skips rows.
        return lancedb.connect(
            str(self.folder),
            read_consistency_interval=timedelta(0),
            storage_options=dict(self.storage_options) or None,
        )


def table_name(fingerprint: str, shard: str) -> str:
    """The LanceDB table of one shard under one model."""
    return f"{fingerprint}--{encode_name(shard)}"


def system_error(error: Exception, place: UPath) -> OSError | None:
    """The operating system's error, which LanceDB reports only as text; None for any other error."""
    number = _OS_ERROR.search(str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(place)) if number else None


def _vector_columns(handle: Any) -> list[str]:
    """The columns to read with the vectors: the names of the rows, and the hashes if there are any."""
    hashes = [ROW_HASH] if ROW_HASH in handle.schema.names else []
    return [*NAMED, "vector", *hashes]


def _checked_vectors(rows: pa.RecordBatch | pa.Table, dimension: int) -> NDArray[np.float32]:
    """The (n, d) vectors of rows, after a check against their hashes.

    Raises:
        ValueError: The vectors differ from those written, or have another length.
    """
    vectors = _matrix(rows, dimension)
    if ROW_HASH in rows.schema.names:
        check_rows(rows, vectors)
    return vectors


def _matrix(rows: pa.RecordBatch | pa.Table, dimension: int) -> NDArray[np.float32]:
    column = rows.column("vector")
    flat = (column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column).flatten()
    vectors: NDArray[np.float32] = flat.to_numpy(zero_copy_only=False).reshape(-1, dimension)
    if len(vectors) != rows.num_rows:
        raise ValueError(f"{rows.num_rows} rows have {len(vectors)} vectors of length {dimension}")
    return vectors


def _is_whole(connection: Any, name: str) -> bool:
    """Whether the last commit of a table can be read."""
    try:
        metadata = connection.open_table(name).schema.metadata or {}
    except (ValueError, RuntimeError):
        return False
    return _CONTENT_FIELD.encode() in metadata


def _check_rows(
    shard: str,
    dimension: int,
    rows: Sequence[int],
    sample_keys: Sequence[str],
    vectors: NDArray[np.float32],
) -> None:
    """Refuse infinities, repeated keys and values that need a cast: LanceDB would store them silently."""
    if vectors.dtype != np.float32 or vectors.shape != (len(rows), dimension):
        raise ValueError(
            f"vectors of shard {shard!r} are {vectors.dtype} {vectors.shape}, expected float32 "
            f"({len(rows)}, {dimension})"
        )
    if len(sample_keys) != len(rows) or len(set(sample_keys)) != len(rows):
        raise ValueError(f"shard {shard!r} has {len(rows)} rows but {len(set(sample_keys))} distinct keys")
    if not (finite := np.isfinite(vectors).all(axis=1)).all():
        first = int(np.argmin(finite))
        raise ValueError(
            f"the vector of row {rows[first]} (sample {sample_keys[first]}) of shard {shard!r} is not finite"
        )
