"""Coordinates of the pool's rows along the kept directions."""

from collections.abc import Iterator
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scalselect_assets.method.subspace.basis import Subspace

from scalselect_assets.choice.pool_rows import PoolRows


class Projections:
    """The rows of U_k of a pool, (n, k), computed once and kept in a temporary file as float32.

    A context manager; the file goes with it. Blocks have some megabytes.
    """

    def __init__(self, rows: PoolRows, frame: pl.DataFrame, subspace: "Subspace", *, unit_rows: bool) -> None:
        """Project all rows of ``frame``, which is ``rows.all()``."""
        from scalselect_assets.method.choice.candidates import projected
        from scalselect_assets.method.subspace.preprocessing import prepared_rows

        self.n, self.k = frame.height, subspace.k
        self._file = TemporaryFile()  # noqa: SIM115 - closed by the context manager that this is
        self._block_rows = max(1, 2**22 // max(1, self.k))
        self._rows: NDArray[np.float32] = (
            np.memmap(self._file, np.float32, "w+", shape=(self.n, self.k))
            if self.n * self.k
            else np.zeros((self.n, self.k), np.float32)
        )
        start = 0
        for (shard,), part in frame.group_by("shard", maintain_order=True):
            numbers = part["row"].to_numpy()
            place = np.full(numbers.max() + 1, -1)
            place[numbers] = np.arange(part.height)
            for batch in rows.embeddings.read(rows.table(str(shard))):
                x = prepared_rows(batch.vector, to_unit_length=unit_rows)
                self._rows[start + place[batch.row]] = projected(x, subspace)
            start += part.height

    def __enter__(self) -> "Projections":
        return self

    def __exit__(self, *_: object) -> None:
        del self._rows
        self._file.close()

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """All rows, in order."""
        for start in range(0, self.n, self._block_rows):
            yield np.asarray(self._rows[start : start + self._block_rows])

    def of(self, chosen: NDArray[np.int64], scale: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
        """Some rows, each coordinate times its ``scale``, (k,)."""
        for start in range(0, len(chosen), self._block_rows):
            yield np.asarray(self._rows[chosen[start : start + self._block_rows]], np.float64) * scale
