"""What a benchmark says about the machine under it: hardware, versions, memory of a process, measured limits.

Nothing here knows of our method. The limits are measured with the libraries that every competitor uses, in
the same process and in turns with the loops that are compared with them, so that a busy machine slows both.
Memory is read from ``/proc``, so this needs Linux.
"""

import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

MIB = 2**20
GIB = 2**30

_P = ParamSpec("_P")
_T = TypeVar("_T")

_LIMIT_ROWS = 8192  # of the matrices whose product measures a limit: long enough to reach the full rate
_STREAM_BYTES = GIB  # read once to measure bandwidth; far above any cache


@dataclass(frozen=True, slots=True)
class Workload:
    """Something to time: ``work`` is in flops, or bytes for ``unit`` GB/s, and is done once by ``run``."""

    name: str
    unit: str
    work: float
    run: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Rate:
    """The seconds that a workload took in each round."""

    unit: str
    work: float
    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """Work per second of the fastest round, in 1e9 flops or bytes."""
        return self.work / min(self.seconds) / 1e9


def fresh_process(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """The result of ``function`` in a Python process of its own, so that its peak memory is its own.

    Raises:
        BrokenProcessPool: The process was killed, most likely for memory.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def resident_bytes() -> int:
    """Memory of this process that is resident now."""
    return _proc_bytes("/proc/self/status", "VmRSS")


def peak_bytes() -> int:
    """The most memory that this process has had resident, since ``forget_peak`` if that was called.

    Read from VmHWM: ``ru_maxrss`` also counts the parent that the process was forked from.
    """
    return _proc_bytes("/proc/self/status", "VmHWM")


def forget_peak() -> None:
    """Let ``peak_bytes`` begin again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def available_bytes() -> int:
    """Memory that new work on this machine can have without swapping."""
    return _proc_bytes("/proc/meminfo", "MemAvailable")


def use_cores(n: int | None) -> int:
    """Confine this process and its children to ``n`` cores (None: all that it has); returns their number.

    Confined by affinity, which BLAS, OpenMP and our own thread pools all respect; a variable for each of
    them would be easy to forget.
    """
    cores = sorted(os.sched_getaffinity(0))
    if n is not None:
        os.sched_setaffinity(0, cores[:n])
    return len(os.sched_getaffinity(0))


def describe() -> dict[str, str]:
    """Hardware, versions and threads, for a header; run it in a process of its own, it imports torch."""
    import scipy.linalg  # noqa: F401 - brings a BLAS of its own, which the list below shall have
    import threadpoolctl
    import torch

    pools = sorted(
        f"{pool['internal_api']} {pool['version'] or ''} {pool.get('architecture', '')}".strip()
        + f": {pool['num_threads']}"
        for pool in threadpoolctl.threadpool_info()
    )
    packages = ("numpy", "scipy", "scikit-learn", "torch", "threadpoolctl")
    return {
        "CPU": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores used of {os.cpu_count()}",
        "RAM": f"{_proc_bytes('/proc/meminfo', 'MemTotal') / GIB:.1f} GiB",
        "load average before the run": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "versions": ", ".join(
            [
                f"Python {platform.python_version()}",
                *(f"{package} {version(package)}" for package in packages),
            ]
        ),
        "thread pools": ", ".join([*pools, f"torch: {torch.get_num_threads()}"]),
        "CUDA": torch.cuda.get_device_name() if torch.cuda.is_available() else "none, so not run",
    }


def limit_workloads(d: int, k: int) -> list[Workload]:
    """What bounds the two loops: products of the shapes and dtypes that they need, and reading memory.

    Args:
        d: Width of the rows.
        k: Directions kept; the product with (d, k) shows what a narrow right side costs.

    Takes 1 GiB and five matrices of 8192 × d.
    """
    import torch

    generator = np.random.default_rng(0)
    stream = torch.ones(_STREAM_BYTES // 8, dtype=torch.float64)
    workloads = [
        Workload("read memory, torch.sum", "GB/s", _STREAM_BYTES, stream.sum),
        Workload("read memory, dot per core", "GB/s", _STREAM_BYTES, _PerCore(stream.numpy()).dot),
    ]
    for dtype in (np.float64, np.float32):
        name = np.dtype(dtype).name
        a = generator.standard_normal((_LIMIT_ROWS, d), dtype=dtype)
        b = generator.standard_normal((_LIMIT_ROWS, d), dtype=dtype)
        flops = 2.0 * _LIMIT_ROWS * d * d
        workloads += [
            _syrk(a),
            _product(f"GEMM {name}, numpy", a.T, b),
            Workload(f"GEMM {name}, numpy per core", "GFLOP/s", flops, _PerCore(b, a).multiply),
            _product(f"GEMM {name}, torch", torch.from_numpy(a).T, torch.from_numpy(b)),
            _product(f"GEMM {name} with (d, k), numpy", b, np.ascontiguousarray(a[:d, :k])),
        ]
    return workloads


def cuda_limit_workloads(d: int) -> list[Workload]:
    """The same bounds on a CUDA device, the copy to it included."""
    import torch

    def synchronous(run: Callable[[], Any]) -> Callable[[], None]:
        def call() -> None:
            run()
            torch.cuda.synchronize()

        return call

    host = torch.ones(_STREAM_BYTES // 8, dtype=torch.float64)
    workloads = [Workload("copy to CUDA", "GB/s", _STREAM_BYTES, synchronous(lambda: host.to("cuda")))]
    for dtype in (torch.float64, torch.float32):
        a = torch.randn(_LIMIT_ROWS, d, dtype=dtype, device="cuda")
        name = f"GEMM {str(dtype).removeprefix('torch.')}, CUDA"
        product = _product(name, a.T, a)
        workloads.append(Workload(name, "GFLOP/s", product.work, synchronous(product.run)))
    return workloads


def time_in_turns(workloads: Iterable[Workload], rounds: int) -> dict[str, Rate]:
    """Time all workloads once per round, after one round that does not count."""
    workloads = list(workloads)
    seconds: dict[str, list[float]] = {workload.name: [] for workload in workloads}
    for _ in range(rounds + 1):
        for workload in workloads:
            start = time.perf_counter()
            workload.run()
            seconds[workload.name].append(time.perf_counter() - start)
    return {
        workload.name: Rate(workload.unit, workload.work, tuple(seconds[workload.name][1:]))
        for workload in workloads
    }


def best_rate(rates: Mapping[str, Rate], beginning: str) -> float:
    """The highest rate among the workloads whose name has this beginning."""
    return max(rate.best for name, rate in rates.items() if name.startswith(beginning))


class _PerCore:
    """BLAS on one thread in each of as many Python threads as there are cores, each on its own part."""

    def __init__(self, right: NDArray[Any], left: NDArray[Any] | None = None) -> None:
        from threadpoolctl import ThreadpoolController

        n_cores = len(os.sched_getaffinity(0))
        self._parts = np.array_split(right, n_cores, axis=-1)
        self._left = left
        self._blas = ThreadpoolController()
        self._cores = ThreadPoolExecutor(n_cores)

    def multiply(self) -> None:
        left = self._left
        if left is not None:
            self._on_each_part(lambda part: left.T @ part)

    def dot(self) -> None:
        self._on_each_part(lambda part: part @ part)

    def _on_each_part(self, function: Callable[[NDArray[Any]], object]) -> None:
        with self._blas.limit(limits=1, user_api="blas"):
            list(self._cores.map(function, self._parts))


def _syrk(a: NDArray[Any]) -> Workload:
    from scipy.linalg import blas

    # A transposed view is what Fortran calls contiguous, so nothing is copied.
    routine = blas.dsyrk if a.dtype == np.float64 else blas.ssyrk
    rows, d = a.shape
    return Workload(
        f"SYRK {a.dtype}, scipy", "GFLOP/s", float(rows * d * (d + 1)), lambda: routine(1.0, a.T, trans=0)
    )


def _product(name: str, left: Any, right: Any) -> Workload:
    flops = 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
    return Workload(name, "GFLOP/s", flops, lambda: left @ right)


def _proc_bytes(path: str, field: str) -> int:
    """A field of a ``/proc`` file that is written as kB."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"Got no field {field!r} in {path}; run this on Linux.")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def matrix_bytes(n: int, d: int, dtype: DTypeLike = np.float32) -> int:
    """Size of an (n, d) matrix."""
    return n * d * np.dtype(dtype).itemsize
