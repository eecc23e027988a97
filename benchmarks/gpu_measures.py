"""What the GPU benchmark measures of one model: speed, kernels, waiting, memory and rounding.

Everything also runs on a CPU, where a test holds it at small size; what only a CUDA device has is None there.
"""

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.representation_pool import ImageFolder
from benchmarks.two_ways import Matrix
from scalselect_assets.method.representation.encoder import ChatSample, Representation, VlmEncoder

_PRODUCT_SIDE: Final = {"cuda": 8192, "cpu": 512}


@dataclass(frozen=True, slots=True)
class Passes:
    """The model alone, on samples prepared before.

    Attributes:
        first: Samples a second, on samples that it has not seen.
        again: Samples a second, on the same ones once more.
        peak_bytes: The most that was allocated on the device beside what was before the pass.
    """

    first: float
    again: float
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Kernels:
    """What one pass over some samples asked of the device.

    Attributes:
        launches: Kernels a sample; on a CPU, operators a sample.
        busy: The part of the pass in which a kernel ran.
        waits: How often the host waited for the device, a sample.
    """

    launches: float
    busy: float | None
    waits: float | None


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """From image files to vectors.

    Attributes:
        rate: Samples a second, once the workers had started.
        busy: The part of that time in which a kernel ran.
        starting: Seconds from a cold start of the workers to the first outcome.
    """

    rate: float
    busy: float | None
    starting: float


def alone(
    encoder: VlmEncoder, items: Sequence[tuple[int, Any]], images: ImageFolder, batch_tokens: int
) -> None:
    """Represent samples that are prepared already."""
    model = cast("Any", copy.copy(encoder))
    model._prepared = lambda *_: (item for item in items)
    for _, outcome in model.encode_as_done((), images, batch_tokens=batch_tokens):
        if not isinstance(outcome, Representation):
            raise RuntimeError(f"a generated sample was rejected: {outcome}")


def wait_for(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one run, its work on the device included."""
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


def represented(
    encoder: VlmEncoder, samples: Sequence[ChatSample], images: ImageFolder, batch_tokens: int, workers: int
) -> list[Representation]:
    """All samples.

    Raises:
        RuntimeError: A generated sample was rejected.
    """
    outcomes = encoder.encode(samples, images, batch_tokens=batch_tokens, workers=workers)
    found = [one for one in outcomes if isinstance(one, Representation)]
    if len(found) < len(outcomes):
        raise RuntimeError(next(str(one) for one in outcomes if not isinstance(one, Representation)))
    return found


def passes(
    encoder: VlmEncoder, items: Sequence[tuple[int, Any]], images: ImageFolder, batch_tokens: int
) -> Passes:
    """A first pass of the model alone over fresh samples, and one more over the same."""
    device = encoder.device
    cuda = device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    first, again = (seconds(lambda: alone(encoder, items, images, batch_tokens), device) for _ in range(2))
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else None
    return Passes(len(items) / first, len(items) / again, peak)


def kernels(
    encoder: VlmEncoder, items: Sequence[tuple[int, Any]], images: ImageFolder, batch_tokens: int
) -> Kernels:
    """Launches, busy share and waiting of a pass of the model alone over fresh samples."""

    def run() -> None:
        alone(encoder, items, images, batch_tokens)

    launches, busy = _profiled(run, encoder.device)
    waits = _waits(run) / len(items) if encoder.device.type == "cuda" else None
    return Kernels(launches / len(items), busy, waits)


def end_to_end(
    encoder: VlmEncoder,
    rounds: Sequence[Sequence[ChatSample]],
    images: ImageFolder,
    batch_tokens: int,
    workers: int,
) -> EndToEnd:
    """A cold start on the first round's samples, the clock on the second's, the profiler on the third's."""
    start = time.perf_counter()
    outcomes = encoder.encode_as_done(rounds[0], images, batch_tokens=batch_tokens, workers=workers)
    next(outcomes)
    starting = time.perf_counter() - start
    for _ in outcomes:
        pass

    def run(samples: Sequence[ChatSample]) -> Callable[[], object]:
        return lambda: represented(encoder, samples, images, batch_tokens, workers)

    rate = len(rounds[1]) / seconds(run(rounds[1]), encoder.device)
    busy = _profiled(run(rounds[2]), encoder.device)[1]
    return EndToEnd(rate, busy, starting)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Flops a second of a large square product."""
    side = _PRODUCT_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def products() -> None:
        for _ in range(10):
            left @ right

    products()
    return 10 * 2 * side**3 / seconds(products, device)


def rounding(exact: Matrix, rounded: Matrix) -> tuple[float, float]:
    """Median and largest difference of a vector, of its largest component."""
    differences = np.abs(rounded - exact).max(axis=1) / np.abs(exact).max(axis=1)
    return float(np.median(differences)), float(differences.max())


def _profiled(run: Callable[[], object], device: torch.device) -> tuple[int, float | None]:
    """Kernels (on a CPU operators) of a run, and the part of it in which one ran."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        wall = seconds(run, device)
    if not cuda:
        of_torch = [event for event in seen.events() if event.name.startswith("aten::")]
        return sum(not event.cpu_children for event in of_torch), None
    ran = sorted(
        (event.time_range.start, event.time_range.end)
        for event in seen.events()
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
    )
    busy, until = 0.0, 0.0
    for begin, end in ran:  # in microseconds; those of two streams may overlap
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return len(ran), busy / 1e6 / wall


def _waits(run: Callable[[], object]) -> int:
    """How often a run makes the host wait for a CUDA device, as torch itself notices."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in seen)
