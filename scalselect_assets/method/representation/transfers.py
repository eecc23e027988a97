"""Copies between the host and a device that the host does not wait for.

A copy from or to ordinary memory makes the host wait until the device has done all that it was asked for
before. From and to page-locked memory, and on a stream of its own, a copy runs beside the device's work.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


class Transfers:
    """Copies tensors to one device and back; on the CPU nothing is copied.

    Attributes:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        """On a CUDA device, copies to it get a stream of their own."""
        self.device = device
        self._stream = (
            torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        )

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the host to fill, page-locked where it is to go to a CUDA device."""
        return torch.empty(*shape, dtype=dtype, pin_memory=self._stream is not None)

    def to_device(self, value: torch.Tensor) -> torch.Tensor:
        """The value of the host on the device, usable by what the device is asked for from here on."""
        if self._stream is None:
            return value.to(self.device)
        pinned = value if value.is_pinned() else value.pin_memory()
        work = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            there = pinned.to(self.device, non_blocking=True)
        work.wait_stream(self._stream)
        there.record_stream(work)
        return there

    def to_host(self, values: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Begin to copy values of the device; the function that is returned waits for them."""
        if self._stream is None:
            kept = list(values)
            return lambda: kept
        copies = [self.empty(*value.shape, dtype=value.dtype) for value in values]
        for copy, value in zip(copies, values, strict=True):
            copy.copy_(value, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.device))

        def wait() -> list[torch.Tensor]:
            done.synchronize()
            return copies

        return wait


def rectangle(rows: Sequence[NDArray[Any]], fill: int = 0) -> torch.Tensor:
    """Rows of different lengths as (B, longest) on the host, filled up at the end."""
    filled = np.full((len(rows), max(map(len, rows))), fill, dtype=rows[0].dtype)
    for target, row in zip(filled, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(filled)
