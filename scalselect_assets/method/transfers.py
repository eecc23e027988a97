"""Copies between the host and a device for which the host does not wait.

A copy from or to ordinary memory makes the host wait until the device has finished all earlier work. A copy
from or to page-locked memory, on a stream of its own, runs at the same time as the device's other work.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

_COPIERS: Final = 4  # threads
_COPIED_BY_ONE: Final = 1 << 20  # bytes that one thread copies as fast as several


class Transfers:
    """Copies tensors to one device and back; on the CPU nothing is copied.

    Attributes:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        """Create the stream for copies to a CUDA device; other devices need none."""
        self.device = device
        self._stream = (
            torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        )

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """An empty tensor on the host, page-locked if the device is a CUDA device."""
        return torch.empty(*shape, dtype=dtype, pin_memory=self._stream is not None)

    def copied(self, x: NDArray[Any], dtype: DTypeLike) -> torch.Tensor:
        """A copy of an array in such memory. Several threads copy: one cannot use the full bandwidth."""
        buffer = self.empty(*x.shape, dtype=torch.from_numpy(np.empty(0, dtype=dtype)).dtype)
        target = buffer.numpy()
        if x.nbytes <= _COPIED_BY_ONE:
            target[...] = x
            return buffer
        step = -(-len(x) // _COPIERS)

        def copy(start: int) -> None:
            target[start : start + step] = x[start : start + step]

        list(_copiers().map(copy, range(0, len(x), step)))
        return buffer

    def to_device(self, value: torch.Tensor) -> torch.Tensor:
        """Copy a value from the host to the device. All later work of the device can use the copy."""
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
        """Begin to copy values from the device. The returned function waits for them."""
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


@cache
def _copiers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_COPIERS, thread_name_prefix="copy")
