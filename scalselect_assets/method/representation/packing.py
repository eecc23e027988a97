"""Samples of different lengths as one tensor: padded to a rectangle, or end to end without padding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scalselect_assets.method.transfers import Transfers


def rectangle(rows: Sequence[NDArray[Any]], fill: int = 0) -> torch.Tensor:
    """Rows of different lengths as one (B, longest) tensor on the host, padded at the end."""
    filled = np.full((len(rows), max(map(len, rows))), fill, dtype=rows[0].dtype)
    for target, row in zip(filled, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(filled)


class Packing:
    """Converts per-token tensors from samples padded on the right to samples end to end."""

    def __init__(self, lengths: Sequence[int], transfers: Transfers) -> None:
        """Prepare the conversion for samples of these lengths."""
        self._n_samples, self._length = len(lengths), max(lengths)
        real = np.arange(self._length) < np.asarray(lengths)[:, None]
        self._places = transfers.to_device(torch.from_numpy(np.flatnonzero(real)))

    def packed(self, value: Any) -> Any:
        """A tensor of (..., B or 1, S, ·) as (..., 1, T, ·); any other value unchanged."""
        if isinstance(value, tuple):
            return tuple(self.packed(item) for item in value)
        if (
            not isinstance(value, torch.Tensor)
            or value.ndim < 3
            or value.shape[-2] != self._length
            or value.shape[-3] not in (1, self._n_samples)
        ):
            return value
        batch = value.expand(*value.shape[:-3], self._n_samples, -1, -1).flatten(-3, -2)
        return batch.index_select(-2, self._places).unsqueeze(-3)
