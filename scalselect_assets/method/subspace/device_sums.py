"""Sums of shifted rows and of their products on a torch device, for moments of rows in the host's memory.

Rows cross to the device as they are stored, as a rule in float32, and are converted, shifted and multiplied
there. While a block is multiplied, the host copies the next one into a page-locked buffer.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_BLOCK_BYTES: Final = 1 << 26
_STRIP: Final = 256  # rows of the triangle that are multiplied at a time


class DeviceSums:
    """Running sums about a shift, in float64 on the device."""

    def __init__(self, d: int, device: str) -> None:
        import torch

        from scalselect_assets.method.transfers import Transfers

        self._torch, self._transfers = torch, Transfers(torch.device(device))

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._shift, self._sum, self._gram = zeros(d), zeros(d), zeros(d, d)
        self._begun = False

    def add(self, x: NDArray[Any]) -> bool:
        """Add (m, d) rows; return whether all sums are still finite."""
        # Narrower floats are exact in float32; integers and wider floats need float64.
        kind = np.float32 if x.dtype in (np.float16, np.float32) else np.float64
        size = max(1, _BLOCK_BYTES // (x.shape[1] * np.dtype(kind).itemsize))
        for start in range(0, len(x), size):
            rows = self._transfers.copied(x[start : start + size], kind)
            self._add(self._transfers.to_device(rows).double())
        return bool(self._torch.isfinite(self._sum).all())

    def _add(self, rows: Any) -> None:
        if not self._begun:
            # By a row first, so that columns that never vary are exactly zero; then by the block's mean.
            self._shift = rows[0].clone()
        rows = rows - self._shift
        if not self._begun:
            offset = rows.mean(0)
            self._shift += offset
            rows -= offset
            self._begun = True
        self._sum += rows.sum(0)
        for i in range(0, len(self._gram), _STRIP):
            self._gram[i : i + _STRIP, i:].addmm_(rows[:, i : i + _STRIP].T, rows[:, i:])

    def on_host(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """The shift, the sum, both (d,), and the upper triangle of the products, (d(d+1)/2,)."""
        d = len(self._gram)
        index = self._torch.triu_indices(d, d, device=self._gram.device)
        shift, total, upper = (
            np.array(value.cpu().numpy())
            for value in (self._shift, self._sum, self._gram[index[0], index[1]])
        )
        return shift, total, upper
