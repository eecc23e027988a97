"""The directions of the subspace that a row's leverage comes from, for rows of a shard."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scalselect_assets.recording.columns import STRONGEST_DIRECTIONS
from scalselect_assets.resources.embedding_store import EmbeddingStore, EmbeddingTable

if TYPE_CHECKING:
    from scalselect_assets.method.subspace.basis import Subspace

DEFAULT_DIRECTIONS: Final = 3


def rows_of(
    embeddings: EmbeddingStore, table: EmbeddingTable, rows: Sequence[int], unit_rows: bool
) -> NDArray[Any]:
    """The vectors that are scored for some rows of a shard, (len(rows), d), in the order of ``rows``."""
    from scalselect_assets.method.subspace.preprocessing import prepared_rows

    return prepared_rows(embeddings.read_vectors(table, rows), to_unit_length=unit_rows)


def directions_of_rows(
    embeddings: EmbeddingStore,
    table: EmbeddingTable,
    subspace: "Subspace",
    rows: Sequence[int],
    *,
    unit_rows: bool,
    n: int = DEFAULT_DIRECTIONS,
) -> pl.DataFrame:
    """The strongest directions of some rows of a shard, the selected ones for example.

    Only these rows' vectors are read. If a share b of a shard's m rows is selected, the cost is b times the
    cost of scoring the shard, b·m·d·k multiplications, and the memory of b·m rows.

    Args:
        embeddings: The vectors.
        table: The shard's table.
        subspace: The basis.
        rows: Row numbers of the shard, each once; there may be none.
        unit_rows: Whether the selection scales vectors to length 1.
        n: Number of directions for each row.

    Returns:
        Columns ``row`` (Int64, in the order given) and ``strongest_directions`` (`STRONGEST_DIRECTIONS`).

    Raises:
        EmbeddingTableError: The table lacks one of the rows, or cannot be read.
    """
    from scalselect_assets.method.subspace.directions import strongest_directions

    schema = pl.Schema({"row": pl.Int64(), "strongest_directions": STRONGEST_DIRECTIONS.dtype})
    if not len(rows) or not subspace.k:
        return pl.DataFrame({"row": list(rows), "strongest_directions": [[] for _ in rows]}, schema=schema)
    found = strongest_directions(subspace, rows_of(embeddings, table, rows, unit_rows), n)
    each = found.direction.shape[1]
    return (
        pl.DataFrame(
            {
                "row": np.repeat(np.asarray(rows, dtype=np.int64), each),
                "direction": found.direction.ravel(),
                "share": found.share.ravel(),
                "coordinate": found.coordinate.ravel(),
            }
        )
        .select(
            "row",
            strongest_directions=pl.struct(pl.col("direction").cast(pl.Int32), "share", "coordinate"),
        )
        .group_by("row", maintain_order=True)
        .all()
        .cast(schema)
    )
