"""A table of all vectors of a pool for one search, in LanceDB beside the shards' own; made and dropped again.

The table holds directions from the pool's mean. The mean moves whenever any shard changes, so no row can be
reused by the next search, and the table is dropped. A killed search leaves its table behind, and the next
search replaces it: there must be one search per store at a time. The names of all shard tables contain
``--`` and this one's does not, so cleaning leaves it alone. Costs: the vectors once more on the disk, and
twice with an index.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from upath import UPath

from scalselect_assets.resources.embedding_store import EmbeddingStore, system_error

SEARCH_TABLE = "near_duplicate_search"

_SCAN_ROWS = 4096
_QUERIES = 256  # at a time, which LanceDB takes as lists of numbers
_FIRST_LIMIT = 64
_LIMIT_GROWTH = 8
_PROBES = 20
_ROUNDING = 1e-5  # of float32 distances; the range is without its end
_LEAST_INDEXED = 100  # fewer rows give no partitions worth the name


@dataclass(frozen=True)
class SearchTable:
    """Unit vectors by position, from 0, in the order in which they were written.

    Attributes:
        table: LanceDB's handle.
        place: Location of the table, for messages.
        n: Number of vectors.
        dimension: Length of each.
        indexed: Whether there is an index; without one, every search reads the whole table.
    """

    table: Any
    place: UPath
    n: int
    dimension: int
    indexed: bool

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors at (m,) distinct positions, one or more, (m, d), in their order.

        Raises:
            OSError: The system does not let them be read.
        """
        with _system_errors(self.place):
            rows = self.table.take_offsets(positions.tolist()).select(["position", "vector"]).to_arrow()
        found = rows["position"].to_numpy()
        matrix = self._matrix(rows["vector"].combine_chunks())
        place = np.argsort(found)
        in_order: NDArray[np.float32] = matrix[place[np.searchsorted(found, positions, sorter=place)]]
        return in_order

    def scan(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """All (m,) positions and (m, d) vectors, in batches; raises as ``take``."""
        with _system_errors(self.place):
            query = self.table.search().select(["position", "vector"]).limit(None)
            for batch in query.to_batches(_SCAN_ROWS):
                yield batch.column("position").to_numpy(), self._matrix(batch.column("vector"))

    def near(
        self, queries: NDArray[np.float32], cosine: float
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """All rows, without an index; with one, those that it finds within ``cosine`` of a query.

        A query with more rows within the cosine than were asked for is repeated with a higher limit, so that
        many copies cannot hide a row. The index misses only rows in partitions that it does not search.
        Raises as ``take``.
        """
        if not self.indexed:
            yield from self.scan()
            return
        found: list[NDArray[np.int64]] = []
        limit, asked = min(_FIRST_LIMIT, self.n), np.arange(len(queries))
        while len(asked):
            again = []
            for start in range(0, len(asked), _QUERIES):
                chunk = asked[start : start + _QUERIES]
                number, position = self._search(queries[chunk], cosine, limit)
                found.append(position)
                again.append(chunk[np.bincount(number, minlength=len(chunk)) >= limit])
            asked = np.concatenate(again) if limit < self.n else asked[:0]
            limit = min(_LIMIT_GROWTH * limit, self.n)
        positions = np.unique(np.concatenate(found))
        for start in range(0, len(positions), _SCAN_ROWS):
            part = positions[start : start + _SCAN_ROWS]
            yield part, self.take(part)

    def _search(
        self, queries: NDArray[np.float32], cosine: float, limit: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The query number and position of each row that the index finds."""
        with _system_errors(self.place):
            rows = (
                self.table.search(list(queries), vector_column_name="vector")
                .distance_type("dot")
                .distance_range(None, 1 - cosine + _ROUNDING)
                .nprobes(_PROBES)
                .limit(limit)
                .select(["position", "_distance"])
                .to_arrow()
            )
        positions: NDArray[np.int64] = rows["position"].to_numpy()
        # A single query has no number.
        if "query_index" not in rows.column_names:
            return np.zeros(len(positions), np.int64), positions
        return rows["query_index"].to_numpy().astype(np.int64), positions

    def _matrix(self, vectors: Any) -> NDArray[np.float32]:
        matrix: NDArray[np.float32] = vectors.flatten().to_numpy(zero_copy_only=False)
        return matrix.reshape(-1, self.dimension)


@contextmanager
def search_table(
    store: EmbeddingStore, dimension: int, batches: Iterable[NDArray[np.float32]], *, exact_up_to: int
) -> Iterator[SearchTable]:
    """A search table for the length of a block.

    Args:
        store: Store in which the search table is made, beside the shards' tables.
        dimension: Length d of each vector.
        batches: (m, d) float32 unit vectors, in the order of their positions.
        exact_up_to: Largest number of vectors (100 if less is given) that every search reads in full; more
            vectors are indexed (IVF, with uncompressed vectors).

    Raises:
        OSError: The disk is full, read-only or not there.
    """
    import lancedb
    from lancedb.index import IvfFlat

    schema = pa.schema([("position", pa.int64()), ("vector", pa.list_(pa.float32(), dimension))])
    place = store.folder / f"{SEARCH_TABLE}.lance"
    connection = lancedb.connect(str(store.folder), storage_options=_options(store.storage_options))
    with _system_errors(place):
        connection.drop_table(SEARCH_TABLE, ignore_missing=True)
        try:
            reader = pa.RecordBatchReader.from_batches(schema, _records(schema, batches))
            table = connection.create_table(SEARCH_TABLE, reader)
            n = table.count_rows()
            indexed = n > max(exact_up_to, _LEAST_INDEXED)
            if indexed:
                config = IvfFlat(distance_type="dot", num_partitions=math.isqrt(n))
                table.create_index("vector", config=config)
            yield SearchTable(table, place, n, dimension, indexed)
        finally:
            connection.drop_table(SEARCH_TABLE, ignore_missing=True)


def _options(options: Mapping[str, str]) -> dict[str, str] | None:
    return dict(options) or None


def _records(schema: pa.Schema, batches: Iterable[NDArray[np.float32]]) -> Iterator[pa.RecordBatch]:
    start = 0
    for batch in batches:
        columns = [
            pa.array(np.arange(start, start + len(batch))),
            pa.FixedSizeListArray.from_arrays(pa.array(batch.reshape(-1)), batch.shape[1]),
        ]
        start += len(batch)
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


@contextmanager
def _system_errors(place: UPath) -> Iterator[None]:
    """Raise an ``OSError`` for an operating system error that LanceDB reports only as text."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if named_error := system_error(error, place):
            raise named_error from error
        raise
