"""Seconds, memory and accuracy from a float32 matrix to the chosen rows: ours, and what others would run.

``python -m benchmarks.scores`` generates data whose spectrum and outlier columns resemble the hidden states
of a language model, and gives the same file to every competitor. Each run is a process of its own, and the
competitors take turns, so that a busy machine slows all of them. Clocked is the way from the matrix in memory
to the indices of the top 16 %; loading the matrix, importing libraries and a warm-up on a tiny matrix are
not. Errors are against the float64 SVD of the same float32 values, or, where that would take too long,
against the eigenvectors of the float64 Gram matrix, which is compared with the SVD at the sizes that have
both. The same run measures what the machine can do and how near our two loops come to it. ``--linearity``
instead shows that our seconds grow linearly in the number of rows, and our memory not at all.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import machine
from benchmarks.machine import GIB, MIB
from scalselect_assets.method.choice.budget import budget_size

BUDGET = 0.16  # arXiv 2602.11636 trains on 16 % of LLaVA-665K
SHARE_OF_ENERGY = 0.9  # of the same paper
_EXTREME_SCALE = 1e3

_GENERATED_ROWS = 4096  # per step of the generator
_SVD_FLOPS = 5e10  # n·d² up to which the reference is an SVD: a minute or less on two cores
_LINEARITY_BLOCKS = 8  # generated once and repeated with another scale, so that no time goes into them

Matrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Data:
    """How to generate a matrix; see ``generate``."""

    n: int
    d: int
    spectrum: float
    outliers: str
    seed: int


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked of a competitor."""

    share_of_energy: float
    n_chosen: int
    true_k: int  # for those that cannot find k themselves
    batch_rows: int  # for ours


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a competitor returns: rank, (n,) scores of any float dtype, (n_chosen,) row indices."""

    k: int
    scores: NDArray[Any]
    chosen: NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Competitor:
    """A way from the matrix to the chosen rows.

    Attributes:
        name: What the table calls it.
        run: The way.
        copies: Memory that it takes beside the matrix, in multiples of it; an estimate, to skip what would
            not fit.
        squares: The same in multiples of a (d, d) float64 matrix.
    """

    name: str
    run: Callable[[Matrix, Task], Outcome]
    copies: float = 0
    squares: float = 0

    def bytes_needed(self, n: int, d: int) -> float:
        """Of the whole process, with half a GiB for libraries and buffers."""
        matrix = machine.matrix_bytes(n, d)
        return GIB / 2 + (1 + self.copies) * matrix + self.squares * machine.matrix_bytes(d, d, np.float64)


@dataclass(frozen=True, slots=True)
class ScoresRun:
    """One timed process; memory in bytes."""

    seconds: float
    cpu_seconds: float
    k: int
    resident_before: int  # matrix and libraries included
    peak: int


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Against the reference: largest and 99.9 percentile of |score / true - 1|, shared part of the top."""

    largest: float
    percentile: float
    overlap: float


@dataclass(frozen=True, slots=True)
class ScoresReference:
    """The scores taken as true, in float64.

    Attributes:
        method: ``SVD`` or ``Gram``.
        k: Rank.
        svd_seconds: Of one float64 SVD, where it was computed.
        gram_error: Largest relative difference of the Gram matrix's scores from the SVD's, likewise.
    """

    method: str
    k: int
    svd_seconds: float | None
    gram_error: float | None


# --- Data ---------------------------------------------------------------------------------------------------


def generate(data: Data) -> Iterator[Matrix]:
    """Blocks of rows with a rotated power-law spectrum, unlike row lengths and outlier columns.

    The j-th direction has variance proportional to j^-spectrum; the mean variance of a column is 1. Row
    lengths are log-normal, because equal ones would give all rows nearly the same leverage. Outlier columns:

    - ``means``: four, with means from 1e3 to 1e4 and each 0.5 % of the energy, as the massive activations of
      language models, which sit far from zero and move little;
    - ``extreme``: one of mean 1e4 and scale 1e3, which holds nearly all energy;
    - ``none``.
    """
    generator = np.random.default_rng(data.seed)
    variance = np.arange(1, data.d + 1) ** -data.spectrum
    variance *= data.d / variance.sum()
    rotation, _ = np.linalg.qr(generator.standard_normal((data.d, data.d)))
    mixing = (np.sqrt(variance)[:, None] * rotation).astype(np.float32)
    mean = generator.standard_normal(data.d)
    scale = np.ones(data.d)
    columns = generator.permutation(data.d)
    if data.outliers == "means":
        columns = columns[:4]
        mean[columns] = np.geomspace(1e3, 1e4, 4) * (-1, 1, -1, 1)
        scale[columns] = np.sqrt(0.005 * data.d)
    elif data.outliers == "extreme":
        columns = columns[:1]
        mean[columns], scale[columns] = 1e4, _EXTREME_SCALE
    else:
        columns = columns[:0]
    for start in range(0, data.n, _GENERATED_ROWS):
        shape = (min(_GENERATED_ROWS, data.n - start), data.d)
        rows = generator.standard_normal(shape, dtype=np.float32) @ mixing
        rows[:, columns] = generator.standard_normal((shape[0], len(columns)))
        rows *= np.exp(generator.normal(0, 0.25, (shape[0], 1)))
        yield (rows * scale + mean).astype(np.float32)


def share_of_energy(options: argparse.Namespace, d: int) -> float:
    """The share that fixes k; beside an extreme column, which alone would be k = 1, 90 % of all the rest."""
    if options.energy is not None:
        return float(options.energy)
    if options.outliers == "extreme":
        return 1 - (1 - SHARE_OF_ENERGY) * d / (d + _EXTREME_SCALE**2)
    return SHARE_OF_ENERGY


def write_data(path: Path, data: Data) -> None:
    """Generate the matrix into a ``.npy`` file, a block at a time."""
    matrix = np.lib.format.open_memmap(path, "w+", np.float32, (data.n, data.d))
    start = 0
    for rows in generate(data):
        matrix[start : start + len(rows)] = rows
        start += len(rows)
    matrix.flush()


# --- Competitors --------------------------------------------------------------------------------------------


def ours(x: Matrix, task: Task, *, device: str = "cpu") -> Outcome:
    """Moments, basis, scores, top."""
    return ours_streamed(lambda: row_blocks(x, task.batch_rows), len(x), x.shape[1], task, device=device)


def ours_streamed(
    blocks: Callable[[], Iterator[Matrix]], n: int, d: int, task: Task, *, device: str = "cpu"
) -> Outcome:
    """The same in two passes over a stream of ``n`` rows, as the assets make them."""
    from scalselect_assets.method.choice.top_n import nth_largest
    from scalselect_assets.method.subspace.basis import fit_subspace
    from scalselect_assets.method.subspace.leverage import LeverageScorer
    from scalselect_assets.method.subspace.moments import accumulate
    from scalselect_assets.method.subspace.rank import EnergyThreshold

    subspace = fit_subspace(accumulate(blocks(), d, device=device), EnergyThreshold(task.share_of_energy))
    scorer = LeverageScorer(subspace, device=device)
    scores = np.empty(n)
    start = 0
    for rows in blocks():
        scores[start : start + len(rows)] = scorer.scores(rows)
        start += len(rows)
    threshold = nth_largest(lambda: [scores], task.n_chosen)
    tied = np.flatnonzero(scores == threshold.value)[: threshold.n_ties_taken]
    return Outcome(subspace.k, scores, np.concatenate([np.flatnonzero(scores > threshold.value), tied]))


def double_svd(x: Matrix, task: Task) -> Outcome:
    """As the published script: a copy is centred, decomposed for k, and decomposed again for U.

    Its first U lives while the second is computed, and its order is that of all rows. The standardisation and
    row normalisation that it offers are left out, as for every competitor. Given float32, numpy takes
    the mean in float32, decomposes in float64 and gives float32 back.
    """
    centred = x.copy()
    centred -= centred.mean(axis=0, keepdims=True)
    first_u, s, first_vt = np.linalg.svd(centred, full_matrices=False)
    k = rank_of(s**2, task.share_of_energy)
    u, _, _ = np.linalg.svd(centred, full_matrices=False)
    del first_u, first_vt
    scores = np.sum(u[:, :k] ** 2, axis=1)
    return Outcome(k, scores, np.argsort(scores)[::-1][: task.n_chosen])


def sklearn_pca(x: Matrix, task: Task, *, solver: str) -> Outcome:
    """scikit-learn's whitened PCA, in the dtype of the matrix."""
    from sklearn.decomposition import PCA

    pca = PCA(task.share_of_energy, svd_solver=solver, whiten=True)
    scores = whitened_scores(pca.fit_transform(x))
    return Outcome(int(pca.n_components_), scores, largest(scores, task.n_chosen))


def sklearn_incremental_pca(x: Matrix, task: Task) -> Outcome:
    """scikit-learn's incremental PCA, which takes k instead of a share of energy."""
    from sklearn.decomposition import IncrementalPCA

    batch_rows = min(5 * x.shape[1], len(x))
    pca = IncrementalPCA(task.true_k, whiten=True, batch_size=batch_rows).fit(x)
    scores = np.concatenate(
        [whitened_scores(pca.transform(rows), len(x)) for rows in row_blocks(x, batch_rows)]
    )
    return Outcome(task.true_k, scores, largest(scores, task.n_chosen))


def torch_svd_lowrank(x: Matrix, task: Task) -> Outcome:
    """The randomised SVD of torch, which takes k and computes 10 further directions."""
    import torch

    torch.manual_seed(0)
    matrix = torch.from_numpy(x)
    u, _, _ = torch.svd_lowrank(matrix - matrix.mean(dim=0), q=min(task.true_k + 10, *x.shape), niter=2)
    scores = u[:, : task.true_k].square().sum(dim=1).numpy()
    return Outcome(task.true_k, scores, largest(scores, task.n_chosen))


DOUBLE_SVD = "numpy SVD, twice"
GIVEN_K = " (given k)"

COMPETITORS = (
    Competitor("ours", ours, squares=8),
    Competitor(DOUBLE_SVD, double_svd, copies=11),
    Competitor("scikit-learn PCA full", partial(sklearn_pca, solver="full"), copies=3.5),
    Competitor(
        "scikit-learn PCA covariance_eigh", partial(sklearn_pca, solver="covariance_eigh"), copies=1.5
    ),
    Competitor("scikit-learn IncrementalPCA" + GIVEN_K, sklearn_incremental_pca, squares=40),
    Competitor("torch svd_lowrank" + GIVEN_K, torch_svd_lowrank, copies=2),
)
CUDA_COMPETITOR = Competitor("ours, CUDA", partial(ours, device="cuda"), squares=8)


def row_blocks(x: Matrix, rows: int) -> Iterator[Matrix]:
    """Views of up to ``rows`` rows, in order."""
    for start in range(0, len(x), rows):
        yield x[start : start + rows]


def largest(scores: NDArray[Any], size: int) -> NDArray[np.intp]:
    """Indices of the ``size`` largest scores, unordered."""
    return np.argpartition(scores, len(scores) - size)[len(scores) - size :]


def rank_of(energies: NDArray[Any], share: float) -> int:
    """The published rule: the first count whose cumulative share of the energy reaches ``share``."""
    cumulative = np.cumsum(energies) / energies.sum()
    return max(1, min(int(np.searchsorted(cumulative, share)) + 1, len(energies)))


def whitened_scores(projected: NDArray[Any], n: int | None = None) -> NDArray[Any]:
    """Leverage from the rows of a whitened projection, whose columns have variance 1 over ``n`` rows."""
    scores: NDArray[Any] = np.square(projected).sum(axis=1) / ((len(projected) if n is None else n) - 1)
    return scores


# --- One process each ---------------------------------------------------------------------------------------


def timed_run(competitor: Competitor, data: Path, task: Task, scores: Path) -> ScoresRun:
    """Load, warm up, and run once on the clock; the scores and the choice go to ``scores``."""
    warm_up(competitor, task)
    x = np.load(data)
    gc.collect()
    machine.forget_peak()
    resident = machine.resident_bytes()
    start, cpu_start = time.perf_counter(), time.process_time()
    outcome = competitor.run(x, task)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = machine.peak_bytes()
    np.savez(scores, scores=outcome.scores, chosen=outcome.chosen)
    return ScoresRun(seconds, cpu_seconds, outcome.k, resident, peak)


def warm_up(competitor: Competitor, task: Task) -> None:
    """Import the libraries and start their threads, on 512 × 64 values."""
    tiny = np.random.default_rng(0).standard_normal((512, 64), dtype=np.float32)
    competitor.run(tiny, Task(task.share_of_energy, 8, 4, task.batch_rows))


def reference_run(data: Path, task: Task, use_svd: bool, scores: Path) -> ScoresReference:
    """Compute the scores that count as true, in float64, without any of our code."""
    x = np.load(data)
    by_gram, k = _scores_by_gram(x, task.share_of_energy)
    if not use_svd:
        np.savez(scores, scores=by_gram, chosen=largest(by_gram, task.n_chosen))
        return ScoresReference("Gram", k, None, None)
    start = time.perf_counter()
    centred = x.astype(np.float64)
    centred -= centred.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    k = rank_of(s**2, task.share_of_energy)
    by_svd = np.square(u[:, :k]).sum(axis=1)
    seconds = time.perf_counter() - start
    np.savez(scores, scores=by_svd, chosen=largest(by_svd, task.n_chosen))
    return ScoresReference("SVD", k, seconds, float(np.abs(by_gram / by_svd - 1).max()))


def _scores_by_gram(x: Matrix, share: float) -> tuple[NDArray[np.float64], int]:
    """Two passes about the true mean, in blocks."""
    mean = x.mean(axis=0, dtype=np.float64)
    gram = np.zeros((x.shape[1], x.shape[1]))
    for rows in row_blocks(x, _GENERATED_ROWS):
        gram += (rows - mean).T @ (rows - mean)
    energies, directions = np.linalg.eigh(gram)
    k = rank_of(energies[::-1], share)
    whitening = directions[:, -k:] / np.sqrt(energies[-k:])
    blocks = [np.square((rows - mean) @ whitening).sum(axis=1) for rows in row_blocks(x, _GENERATED_ROWS)]
    return np.concatenate(blocks), k


def loops_run(data: Path, task: Task, rounds: int, device: str) -> tuple[str, dict[str, machine.Rate]]:
    """The dtype of the projection, and the rates of the machine's limits and our two loops, in turns."""
    from scalselect_assets.method.subspace.basis import fit_subspace
    from scalselect_assets.method.subspace.leverage import LeverageScorer, projection_dtype
    from scalselect_assets.method.subspace.moments import accumulate
    from scalselect_assets.method.subspace.rank import EnergyThreshold

    x = np.load(data)
    n, d = x.shape
    subspace = fit_subspace(
        accumulate(row_blocks(x, task.batch_rows), d), EnergyThreshold(task.share_of_energy)
    )
    scorer = LeverageScorer(subspace, device=device)

    def moments() -> None:
        accumulate(row_blocks(x, task.batch_rows), d, device=device)

    def projection() -> None:
        for rows in row_blocks(x, task.batch_rows):
            scorer.scores(rows)

    workloads = [
        # A symmetric product needs n·d·(d+1)/2 multiplications and as many additions.
        machine.Workload(MOMENTS_LOOP, "GFLOP/s", float(n * d * (d + 1)), moments),
        machine.Workload(PROJECTION_LOOP, "GFLOP/s", 2.0 * n * d * subspace.k, projection),
        *(machine.limit_workloads(d, subspace.k) if device == "cpu" else machine.cuda_limit_workloads(d)),
    ]
    return np.dtype(projection_dtype(subspace)).name, machine.time_in_turns(workloads, rounds)


MOMENTS_LOOP = "our moments"
PROJECTION_LOOP = "our projection"


def linearity_run(data: Data, task: Task) -> ScoresRun:
    """Ours on a stream of ``data.n`` rows that are never in memory together; making them is not counted."""
    rows_of_base = _LINEARITY_BLOCKS * task.batch_rows
    base = np.concatenate(list(generate(replace(data, n=rows_of_base))))
    mean = base.mean(axis=0, dtype=np.float64).astype(np.float32)
    base -= mean
    generating = 0.0

    def blocks() -> Iterator[Matrix]:
        nonlocal generating
        for position, start in enumerate(range(0, data.n, task.batch_rows)):
            clock = time.perf_counter()
            repeat, which = divmod(position, _LINEARITY_BLOCKS)
            rows = base[which * task.batch_rows :][: min(task.batch_rows, data.n - start)]
            # About the mean, so that the spectrum and with it k stay as they are.
            rows = rows * np.float32(1 + 2**-10 * (repeat % 64)) + mean
            generating += time.perf_counter() - clock
            yield rows

    warm_up(COMPETITORS[0], task)
    machine.forget_peak()
    resident = machine.resident_bytes()
    start, cpu_start = time.perf_counter(), time.process_time()
    outcome = ours_streamed(blocks, data.n, data.d, task)
    seconds = time.perf_counter() - start - generating
    return ScoresRun(seconds, time.process_time() - cpu_start, outcome.k, resident, machine.peak_bytes())


# --- Report -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table of one size; ``skipped`` says why there are no runs."""

    name: str
    runs: tuple[ScoresRun, ...] = ()
    accuracy: Accuracy | None = None
    skipped: str = ""

    @property
    def best(self) -> float:
        """Seconds of the fastest run."""
        return min(run.seconds for run in self.runs)


def compare(data: Data, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All competitors on one matrix; prints as it goes and returns what the JSON file holds."""
    matrix = folder / f"{data.n}x{data.d}.npy"
    machine.fresh_process(write_data, matrix, data)
    share = share_of_energy(options, data.d)
    task = Task(share, budget_size(BUDGET, data.n), 0, options.batch_rows)
    use_svd = options.reference == "svd" or (options.reference == "auto" and data.n * data.d**2 <= _SVD_FLOPS)
    true_scores = folder / "reference.npz"
    reference = machine.fresh_process(reference_run, matrix, task, use_svd, true_scores)
    task = Task(share, task.n_chosen, reference.k, options.batch_rows)

    competitors = [*COMPETITORS, *([CUDA_COMPETITOR] if options.cuda else [])]
    chosen = [c for c in competitors if not options.only or any(part in c.name for part in options.only)]
    lines = run_in_turns(chosen, data, task, options, matrix, true_scores)
    dtype, rates = machine.fresh_process(loops_run, matrix, task, options.rounds, "cpu")
    cuda_rates: dict[str, machine.Rate] = {}
    if options.cuda:
        _, cuda_rates = machine.fresh_process(loops_run, matrix, task, options.rounds, "cuda")
    matrix.unlink()

    print_comparison(data, task, reference, lines)
    print_limits(data, reference.k, dtype, rates)
    if cuda_rates:
        print_cuda_limits(cuda_rates)
    return {
        "data": asdict(data),
        "task": asdict(task),
        "reference": asdict(reference),
        "competitors": [asdict(line) for line in lines],
        "projection_dtype": dtype,
        "rates": {name: asdict(rate) for name, rate in rates.items()},
        "cuda_rates": {name: asdict(rate) for name, rate in cuda_rates.items()},
    }


def run_in_turns(
    competitors: Sequence[Competitor],
    data: Data,
    task: Task,
    options: argparse.Namespace,
    matrix: Path,
    true_scores: Path,
) -> list[Line]:
    """Each competitor once per repetition, so that all see the same good and bad moments of the machine."""
    runs: dict[str, list[ScoresRun]] = {competitor.name: [] for competitor in competitors}
    accuracy: dict[str, Accuracy] = {}
    skipped: dict[str, str] = {}
    for repetition in range(options.repetitions):
        for competitor in competitors:
            name = competitor.name
            limit = options.memory_limit * GIB if options.memory_limit else 0.9 * machine.available_bytes()
            needed = competitor.bytes_needed(data.n, data.d)
            too_slow = repetition > 0 and runs[name] and runs[name][0].seconds > options.once_above
            if name in skipped or too_slow:
                continue
            if needed > limit:
                skipped[name] = f"needs about {needed / GIB:.1f} GiB, {limit / GIB:.1f} GiB are allowed"
                continue
            print(f"{data.n} × {data.d}, round {repetition + 1}: {name}", file=sys.stderr, flush=True)
            scores = matrix.with_suffix(".scores.npz")
            try:
                runs[name].append(machine.fresh_process(timed_run, competitor, matrix, task, scores))
            except BrokenProcessPool:
                skipped[name] = f"killed, most likely for memory; about {needed / GIB:.1f} GiB were expected"
                continue
            accuracy[name] = compare_scores(scores, true_scores)
    return [Line(name, tuple(runs[name]), accuracy.get(name), skipped.get(name, "")) for name in runs]


def compare_scores(scores: Path, true_scores: Path) -> Accuracy:
    """How far the scores and the choice of one run are from the reference's."""
    with np.load(scores) as found, np.load(true_scores) as true:
        error = np.abs(found["scores"].astype(np.float64) / true["scores"] - 1)
        common = np.intersect1d(found["chosen"], true["chosen"]).size
        return Accuracy(
            float(error.max()), float(np.quantile(error, 0.999)), common / max(1, true["chosen"].size)
        )


def print_comparison(data: Data, task: Task, reference: ScoresReference, lines: Sequence[Line]) -> None:
    """The table of one size."""
    print(f"\n## {data.n} × {data.d}\n")
    print(
        f"float32, spectrum j^-{data.spectrum:g}, outliers: {data.outliers}, seed {data.seed}. "
        f"{task.share_of_energy:.7g} of the energy is k = {reference.k}; {task.n_chosen} rows are chosen."
    )
    if reference.svd_seconds is None:
        print("Reference: eigenvectors of the float64 Gram matrix about the mean.")
    else:
        print(
            f"Reference: one float64 numpy SVD ({reference.svd_seconds:.2f} s). Scores by the float64 Gram "
            f"matrix differ from it by at most {reference.gram_error:.1e}, relatively."
        )
    double = next((line for line in lines if line.name == DOUBLE_SVD and line.runs), None)
    print(
        "\n| | best s | median s | runs | × double SVD | k | before MiB | peak MiB | own MiB "
        "| max rel. error | 99.9 % below | top 16 % shared |"
    )
    print("|---|" + "---:|" * 11)
    for line in lines:
        if not line.runs or line.accuracy is None:
            print(f"| {line.name} | not run: {line.skipped} |" + " |" * 10)
            continue
        peak = max(line.runs, key=lambda run: run.peak - run.resident_before)
        cells = (
            f"{line.best:.2f}",
            f"{median(run.seconds for run in line.runs):.2f}",
            f"{len(line.runs)}",
            f"{double.best / line.best:.1f}" if double else "",
            f"{line.runs[0].k}",
            f"{peak.resident_before / MIB:.0f}",
            f"{peak.peak / MIB:.0f}",
            f"{(peak.peak - peak.resident_before) / MIB:.0f}",
            f"{line.accuracy.largest:.1e}",
            f"{line.accuracy.percentile:.1e}",
            f"{line.accuracy.overlap:.2%}",
        )
        print(f"| {line.name} | " + " | ".join(cells) + " |")
    print(
        "\n× double SVD: how many times faster, best against best. Before: resident, with libraries and the "
        "matrix. Own: peak less that. Given k: cannot find k from a share of the energy, so it was given the "
        "reference's. Where a competitor that finds k itself has another one, its errors show that."
    )


def print_limits(data: Data, k: int, projection_dtype: str, rates: dict[str, machine.Rate]) -> None:
    """What the machine reached, and which part of it our loops did."""
    print("\n| limit | best |\n|---|---:|")
    for name, rate in rates.items():
        if name not in {MOMENTS_LOOP, PROJECTION_LOOP}:
            print(f"| {name} | {rate.best:.1f} {rate.unit} |")
    reading = machine.matrix_bytes(data.n, data.d) / 1e9 / machine.best_rate(rates, "read memory")
    print(
        "\n| loop | dtype | best s | GFLOP/s | of scipy's SYRK | of the best product | of the roofline "
        "| roofline s: cores, memory |\n|---|---|" + "---:|" * 6
    )
    for name, dtype in ((MOMENTS_LOOP, "float64"), (PROJECTION_LOOP, projection_dtype)):
        loop, syrk = rates[name], rates[f"SYRK {dtype}, scipy"].best
        product = max(machine.best_rate(rates, f"GEMM {dtype}"), syrk)
        computing = loop.work / 1e9 / product
        cells = (
            dtype,
            f"{min(loop.seconds):.3f}",
            f"{loop.best:.1f}",
            f"{loop.best / syrk:.0%}" if name == MOMENTS_LOOP else "",
            f"{loop.best / product:.0%}",
            f"{max(computing, reading) / min(loop.seconds):.0%}",
            f"{computing:.3f}, {reading:.3f}",
        )
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(
        f"\nMoments count n·d·(d+1) flops, half of a full product; the projection 2·n·d·k, with k = {k}. The "
        "best product is the fastest GEMM or SYRK of that dtype above. Roofline: the seconds that the cores "
        "need for the flops, or the memory for reading the float32 matrix once, whichever is more. A loop's "
        "time holds all that it does: checks, conversion, centring."
    )


def print_cuda_limits(rates: dict[str, machine.Rate]) -> None:
    """The same of the CUDA path, whose data comes from host memory."""
    print("\n| CUDA | best s | rate |\n|---|---:|---:|")
    for name, rate in rates.items():
        print(f"| {name} | {min(rate.seconds):.2f} | {rate.best:.1f} {rate.unit} |")


def measure_linearity(options: argparse.Namespace) -> dict[str, Any]:
    """Ours over the number of rows; prints the table and the fit, draws the plot."""
    runs: dict[int, list[ScoresRun]] = {n: [] for n in options.linearity_rows}
    for repetition in range(options.repetitions):
        for n, of_size in runs.items():
            print(f"linearity, round {repetition + 1}: {n}", file=sys.stderr, flush=True)
            data = Data(n, options.linearity_dimension, options.spectrum, options.outliers, options.seed)
            task = Task(share_of_energy(options, data.d), budget_size(BUDGET, n), 0, options.batch_rows)
            of_size.append(machine.fresh_process(linearity_run, data, task))

    rows = np.array(list(runs), dtype=np.float64)
    best = np.array([min(run.seconds for run in of_size) for of_size in runs.values()])
    slope, intercept = np.polyfit(rows, best, 1)
    r_squared = 1 - np.square(best - intercept - slope * rows).sum() / np.square(best - best.mean()).sum()

    print(f"\n## Linearity, d = {options.linearity_dimension}\n")
    print("| rows | best s | median s | fit s | rows/s | k | own MiB |\n|" + "---:|" * 7)
    for n, seconds, of_size in zip(runs, best, runs.values(), strict=True):
        own = max(run.peak - run.resident_before for run in of_size)
        print(
            f"| {n} | {seconds:.2f} | {median(run.seconds for run in of_size):.2f} "
            f"| {intercept + slope * n:.2f} | {n / seconds:.0f} | {of_size[0].k} | {own / MIB:.0f} |"
        )
    print(
        f"\nLeast squares through the best of each size: {intercept:.3f} s + {slope * 1e6:.2f} µs per row, "
        f"R² = {r_squared:.5f}. Rows come as a stream of batches of {options.batch_rows}; the time to make "
        "them is not counted, and they are never in memory together."
    )
    draw_linearity(runs, float(slope), float(intercept), float(r_squared), options)
    return {
        "seconds_fixed": float(intercept),
        "seconds_per_row": float(slope),
        "r_squared": float(r_squared),
        "runs": {n: [asdict(run) for run in of_size] for n, of_size in runs.items()},
    }


def draw_linearity(
    runs: dict[int, list[ScoresRun]],
    slope: float,
    intercept: float,
    r_squared: float,
    options: argparse.Namespace,
) -> None:
    """All runs, the best of each size, and the fit, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    every = np.array([(n, run.seconds) for n, of_size in runs.items() for run in of_size])
    best = np.array([(n, min(run.seconds for run in of_size)) for n, of_size in runs.items()])
    ends = np.array([0, max(runs)])
    label = f"{intercept:.2f} s + {slope * 1e6:.1f} µs per row, R² = {r_squared:.4f}"
    axes.plot(ends, intercept + slope * ends, color="tab:gray", linewidth=1, label=label)
    axes.scatter(every[:, 0], every[:, 1], s=14, color="tab:blue", alpha=0.35, label="each run")
    axes.scatter(best[:, 0], best[:, 1], s=28, color="tab:blue", label="best of its size")
    axes.set(
        xlabel="rows",
        ylabel="seconds from stream to selection",
        title=f"d = {options.linearity_dimension}, {machine.use_cores(None)} cores",
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.xaxis.set_major_formatter(lambda n, _: f"{n / 1000:.0f}k")
    axes.legend(frameon=False)
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.plot, dpi=160, metadata={"Software": None})
    print(f"\nPlot: {options.plot}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the options ask for, print it as Markdown, and write it as JSON if asked to."""
    options = parse_options(arguments)
    machine.use_cores(options.cores)
    header = machine.fresh_process(machine.describe)
    options.cuda = not header["CUDA"].startswith("none")
    header["dtype"] = "matrix float32; reference float64; each competitor in the dtype it chooses for float32"
    print("# Scores\n")
    for name, value in header.items():
        print(f"- {name}: {value}")
    results: dict[str, Any] = {"header": header}
    if options.linearity:
        results["linearity"] = measure_linearity(options)
    else:
        results["sizes"] = []
        with tempfile.TemporaryDirectory(prefix="scalselect-benchmark-") as folder:
            for n, d in options.sizes:
                data = Data(n, d, options.spectrum, options.outliers, options.seed)
                results["sizes"].append(compare(data, options, Path(folder)))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scores",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--sizes", nargs="+", type=_size, default=[(20000, 1024), (50000, 2048)], help="such as 20000x1024")
    add("--repetitions", type=int, default=3, help="runs of each competitor (3)")
    add("--rounds", type=int, default=5, help="of the machine's limits and our loops, in turns (5)")
    add("--once-above", type=float, default=60, help="seconds from which a competitor runs only once (60)")
    add("--only", nargs="+", help="parts of the names of the competitors to run")
    add("--memory-limit", type=float, help="GiB that a process may need (90 %% of what is available)")
    add("--cores", type=int, help="cores to use (all)")
    add("--spectrum", type=float, default=1.4, help="exponent of the spectrum's decay (1.4)")
    add("--outliers", choices=("means", "extreme", "none"), default="means", help="see generate()")
    add("--energy", type=float, help="share that fixes k (0.9, of the rest if outliers are extreme)")
    add("--seed", type=int, default=0)
    add("--batch-rows", type=int, default=4096, help="rows per batch of ours (4096, as the assets read)")
    add(
        "--reference",
        choices=("auto", "svd", "gram"),
        default="auto",
        help="how the true scores are computed",
    )
    add("--linearity", action="store_true", help="measure ours over the number of rows instead")
    add("--linearity-rows", nargs="+", type=int, default=[10000 * 2**i for i in range(6)])
    add("--linearity-dimension", type=int, default=1024)
    add("--plot", type=Path, default=Path("docs/images/scores-linearity.png"), help="of --linearity")
    add("--json", type=Path, help="also write all numbers there")
    return parser.parse_args(arguments)


def _size(text: str) -> tuple[int, int]:
    n, _, d = text.partition("x")
    return int(n), int(d)


if __name__ == "__main__":
    main()
