"""Speed, memory and accuracy of the representation: ours, and the whole model with eager attention.

Both ways get the same samples and the same generated checkpoint: a real architecture of Transformers with
random weights, sharded as on the hub, and its real processor on a small tokenizer. The straightforward way
runs the whole model on one sample at a time, with all attentions and hidden states, and applies the
definition to them. Both are clocked from image files (in the page cache) to vectors, in one process and in
turns, so that a busy machine slows both; the rate of the machine's matrix products is measured in the same
turns. Each round has samples of its own, so every round is a first pass over samples that were never seen: no
two samples of a real pool have the same shape, and what is planned, compiled or tuned for a shape would cost
nothing on the second pass. Memory and seconds to load are of a process of its own for each way.

It needs numpy, torch, Transformers, Pillow and Jinja alone, so that a bare GPU machine can run it, as
``python -m benchmarks.representation`` or by its path from the root of the repository. The tables of
``docs/benchmarks.md`` are

* throughput, limit and breakdown on two cores: without options;
* the same on a GPU: ``--model llava-1.5-7b --device cuda --samples 4096 --workers 15 --batch-tokens 16384``
  and likewise ``--model qwen3-vl-8b``;
* bfloat16 against float32: ``--agreement --samples 1024 --model llava-1.5-7b --device cuda``;
* memory to load a 7B checkpoint: ``--load-memory --model llava-1.5-7b``, which needs 14 GB of disk, or as
  much as there is, under ``--folder``.
"""

import argparse
import copy
import importlib.util
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.machine import GIB
from benchmarks.representation_model import (
    COMPLETE,
    DTYPES_ON_DISK,
    PRESETS,
    Generated,
    checkpoint_bytes,
    empty_model,
    layers_that_fit,
    write_checkpoint,
)
from benchmarks.representation_pool import ImageFolder, PicturePool, make_pools
from benchmarks.representation_print import describe, print_agreement, print_comparison, print_load_memory
from benchmarks.representation_results import Agreement, Breakdown, MeasuredSpeed, Memory, SpeedComparison
from benchmarks.representation_work import matmul_workloads, work_per_sample
from benchmarks.two_ways import OURS, STRAIGHTFORWARD, How, Matrix, Straightforward
from scalselect_assets.method.representation.encoder import ChatSample, Representation, VlmEncoder
from scalselect_assets.method.representation.loading import resolve_device
from scalselect_assets.method.representation.processors import load_processor

_TOLERANCE: Final = 1e-4  # float32, of a vector's largest component
_BREAKDOWN_SAMPLES: Final = 256  # prepared by one thread in every round, which is slow beside a GPU
_TOP: Final = 0.16  # arXiv 2602.11636 trains on 16 % of LLaVA-665K
_SHARE_OF_ENERGY: Final = 0.9  # of the same paper


def memory_run(way: str, how: How, samples: Sequence[ChatSample]) -> Memory:
    """Load one way and run it on some samples (none: only load)."""
    config = transformers.AutoConfig.from_pretrained(how.folder)
    load_processor(str(how.folder), None, config)
    empty_model(config, how.dtype)  # imports what a model of this kind needs
    cuda = resolve_device(how.device).type == "cuda"
    if cuda:
        torch.zeros(1, device="cuda")
    before = machine.resident_bytes()
    machine.forget_peak()
    start = time.perf_counter()
    loaded: Straightforward | VlmEncoder = how.encoder() if way == OURS else how.straightforward()
    how.synchronise()
    seconds = time.perf_counter() - start
    peak_of_load, resident = machine.peak_bytes(), machine.resident_bytes()
    weights = None
    if isinstance(loaded, VlmEncoder):
        weights = loaded.card.n_parameters * cast("int", getattr(torch, how.dtype).itemsize)
        if samples:
            how.encode(loaded, samples)
    elif samples:
        loaded.represent(samples, how.images)
    return Memory(
        seconds,
        before,
        peak_of_load,
        resident,
        machine.peak_bytes(),
        torch.cuda.max_memory_allocated() if cuda else None,
        weights,
    )


def comparison_run(
    how: How, pools: Sequence[PicturePool], of_parts: PicturePool, ways: Sequence[str]
) -> SpeedComparison:
    """Load both ways and clock them in turns with the machine's products."""
    config = transformers.AutoConfig.from_pretrained(how.folder)
    few = [samples[: how.baseline_samples] for samples in pools[0].rounds]
    encoder = how.encoder() if OURS in ways else None
    baseline = how.straightforward() if STRAIGHTFORWARD in ways else None
    workloads = matmul_workloads(config, how)
    products = [workload.name for workload in workloads]
    found: dict[str, Any] = {}

    def remember(name: str, run: Callable[[], Any]) -> machine.Workload:
        def clocked() -> None:
            print(f"running: {name}", file=sys.stderr, flush=True)
            found[name] = run()
            how.synchronise()

        return machine.Workload(name, "", 1, clocked)

    if baseline:
        turns = iter(few)
        workloads.append(
            remember(STRAIGHTFORWARD, lambda: baseline.represent(next(turns), how.images))  # type: ignore[union-attr]
        )
    parts: _MeasuredParts | None = None
    if encoder:
        workloads += [
            remember(f"{OURS} {pool.reuse:g}", _each_round_once(how, encoder, pool)) for pool in pools
        ]
        parts = _MeasuredParts(how, encoder, of_parts)
        workloads += [
            remember("preparation alone", parts.prepare),
            remember("model alone", parts.run_model),
        ]
    rates = machine.time_in_turns(workloads, how.repeats)

    speeds, work, tokens = [], {}, {}
    representations: list[Representation] = []
    for pool in pools if encoder else ():
        representations = found[f"{OURS} {pool.reuse:g}"]
        mean_tokens = float(np.mean([one.n_tokens for one in representations]))
        speeds.append(
            MeasuredSpeed(
                OURS,
                pool.reuse,
                len(pool.rounds[-1]),
                mean_tokens,
                rates[f"{OURS} {pool.reuse:g}"].seconds,
            )
        )
        work[pool.reuse] = work_per_sample(config, pool.rounds[-1], representations)
    difference = None
    if encoder:
        representations = found[f"{OURS} {pools[0].reuse:g}"]
        tokens = {
            name: float(np.mean([getattr(one, f"n_{name}") for one in representations]))
            for name in ("tokens", "vision_tokens", "dominant_tokens", "instruction_tokens")
        }
    if baseline:
        mean_tokens = (
            float(np.mean([one.n_tokens for one in representations[: len(few[-1])]]))
            if representations
            else math.nan
        )
        seconds = rates[STRAIGHTFORWARD].seconds
        speeds.insert(0, MeasuredSpeed(STRAIGHTFORWARD, pools[0].reuse, len(few[-1]), mean_tokens, seconds))
    if encoder and baseline:
        ours = np.stack([one.vector for one in representations[: len(few[-1])]])
        difference = float(relative_differences(ours, found[STRAIGHTFORWARD]).max())
    return SpeedComparison(
        tuple(speeds),
        work,
        {name: rates[name].best for name in products},
        parts.breakdown(rates) if parts else None,
        tokens,
        difference,
    )


def _each_round_once(how: How, encoder: VlmEncoder, pool: PicturePool) -> Callable[[], list[Representation]]:
    rounds = iter(pool.rounds)
    return lambda: how.encode(encoder, next(rounds))


def relative_differences(found: Matrix, expected: Matrix) -> Matrix:
    """(n,) largest difference of each row, of its largest component."""
    largest: Matrix = np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1)
    return largest


class _MeasuredParts:
    """Runs the preparation alone, and the model alone on what was prepared, which it has not seen before."""

    def __init__(self, how: How, encoder: VlmEncoder, pool: PicturePool) -> None:
        self._how, self._encoder, self._rounds = how, encoder, iter(pool.rounds)
        self._n, self._samples = len(pool.rounds[0]), pool.rounds[0]
        self._prepared: list[Any] = []
        self._clocked = _ClockedFirstLayer(encoder._first_layer, how)
        self._model = cast("Any", copy.copy(encoder))
        self._model._first_layer = self._clocked
        self._model._prepared = lambda *_: (item for item in self._prepared)
        self._seconds: list[tuple[float, float]] = []

    def prepare(self) -> None:
        self._samples = next(self._rounds)
        self._prepared = list(self._encoder._prepared(self._samples, self._how.images, 0))

    def run_model(self) -> None:
        self._clocked.tower = self._clocked.layer = 0.0
        self._model.encode(self._samples, self._how.images, batch_tokens=self._how.batch_tokens)
        self._seconds.append((self._clocked.tower, self._clocked.layer))

    def breakdown(self, rates: Mapping[str, machine.Rate]) -> Breakdown:
        n = self._n
        counted = zip(rates["model alone"].seconds, self._seconds[1:], strict=True)
        total, (tower, layer) = min(counted)
        preparation = min(rates["preparation alone"].seconds)
        return Breakdown(preparation / n, tower / n, layer / n, (total - tower - layer) / n)


class _ClockedFirstLayer:
    """A first layer that adds up the seconds in its two parts."""

    def __init__(self, first_layer: Any, how: How) -> None:
        self._first_layer, self._how = first_layer, how
        self.device = first_layer.device
        self.tower = self.layer = 0.0

    def image_features(self, *arguments: Any) -> Any:
        with self._clock() as seconds:
            features = self._first_layer.image_features(*arguments)
        self.tower += seconds[0]
        return features

    def steps(self, *arguments: Any) -> Generator[None, None, Any]:
        steps = self._first_layer.steps(*arguments)
        while True:
            try:
                with self._clock() as seconds:
                    next(steps)
            except StopIteration as finished:
                self.layer += seconds[0]
                return finished.value
            self.layer += seconds[0]
            yield

    @contextmanager
    def _clock(self) -> Iterator[list[float]]:
        seconds: list[float] = []
        self._how.synchronise()
        start = time.perf_counter()
        try:
            yield seconds
        finally:
            self._how.synchronise()
            seconds.append(time.perf_counter() - start)


def vectors_run(how: How, pool: PicturePool) -> Matrix:
    """(n, d)."""
    return np.stack([one.vector for one in how.encode(how.encoder(), pool.rounds[0])])


def agreement(how: How, pool: PicturePool) -> Agreement:
    """Represent a pool in both dtypes and compare what is selected."""
    exact, rounded = (
        machine.fresh_process(vectors_run, replace(how, dtype=dtype), pool)
        for dtype in ("float32", "bfloat16")
    )
    by, (k, scores), (other_k, other_scores) = (
        _scores_by(),
        leverage_scores(exact),
        leverage_scores(rounded),
    )
    size = round(_TOP * len(scores))
    tops = [set(np.argsort(-one, kind="stable")[:size].tolist()) for one in (scores, other_scores)]
    differences = relative_differences(rounded, exact)
    return Agreement(
        len(scores),
        (k, other_k),
        float(np.median(differences)),
        float(differences.max()),
        len(tops[0] & tops[1]) / size,
        by,
    )


def _scores_by() -> str:
    bare = any(importlib.util.find_spec(name) is None for name in ("scipy", "threadpoolctl"))
    return "numpy's SVD in float64, as SciPy or threadpoolctl is missing" if bare else "our method"


def leverage_scores(x: Matrix) -> tuple[int, NDArray[np.float64]]:
    """Rank and scores; by an SVD where the machine has not what our method needs for them."""
    if _scores_by() != "our method":
        centred = x - x.mean(axis=0, dtype=np.float64)
        u, s, _ = np.linalg.svd(centred, full_matrices=False)
        k = int(np.searchsorted(np.cumsum(s**2) / np.square(s).sum(), _SHARE_OF_ENERGY)) + 1
        return k, np.square(u[:, :k]).sum(axis=1)
    from scalselect_assets.method.subspace.basis import fit_subspace
    from scalselect_assets.method.subspace.leverage import LeverageScorer
    from scalselect_assets.method.subspace.moments import Moments
    from scalselect_assets.method.subspace.rank import EnergyThreshold

    subspace = fit_subspace(Moments.of(x), EnergyThreshold(_SHARE_OF_ENERGY))
    return subspace.k, LeverageScorer(subspace).scores(x)


def checkpoint(options: argparse.Namespace, scratch: Path) -> tuple[Path, str]:
    """A generated checkpoint, or the one kept in ``--checkpoint``, and its layers in words."""
    wanted = int(PRESETS[options.model].text["num_hidden_layers"])
    folder = options.checkpoint or scratch / "checkpoint"
    marker = folder / COMPLETE
    if marker.exists():
        generated = Generated(**json.loads(marker.read_text()))
        if (generated.model, generated.seed) != (options.model, options.seed):
            raise SystemExit(f"{folder} holds {generated}; remove it or name another --checkpoint")
    elif folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty and holds no complete checkpoint; remove it")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        generated = Generated(options.model, layers_that_fit(options.model, folder), options.seed)
        print(f"generating {generated} in {folder}", file=sys.stderr, flush=True)
        machine.fresh_process(write_checkpoint, folder, generated)
    if generated.layers < wanted:
        return folder, f"{generated.layers} of {wanted} (no room for more on the disk)"
    return folder, f"{wanted}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the options ask for, print it as Markdown, and write it as JSON if asked to."""
    options = parse_options(arguments)
    machine.use_cores(options.cores)
    options.dtype = options.dtype or PRESETS[options.model].dtype
    ways = [way for way in (STRAIGHTFORWARD, OURS) if way in (options.only or way)]
    header = machine.fresh_process(describe, options.device)
    with tempfile.TemporaryDirectory(prefix="scalselect-benchmark-", dir=options.folder) as scratch:
        folder, layers = checkpoint(options, Path(scratch))
        header["model"] = (
            f"{options.model}, {layers} layers, {checkpoint_bytes(folder) / GIB:.2f} GiB on disk"
        )
        header["dtype"] = options.dtype
        header["batches"] = f"{options.batch_tokens} tokens, {options.workers} workers"
        print("# Representation\n")
        for name, value in header.items():
            print(f"- {name}: {value}", flush=True)
        images = Path(scratch) / "images"
        images.mkdir()
        how = How(
            folder,
            ImageFolder(images),
            options.device,
            options.dtype,
            options.batch_tokens,
            options.workers,
            options.baseline_samples,
            options.repeats,
        )
        results = {"header": header, **measure(options, how, ways, layers)}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    difference = results.get("comparison", {}).get("difference")
    if options.dtype == "float32" and difference is not None and not difference < _TOLERANCE:
        raise SystemExit(
            f"the two ways differ by {difference:.1e}; in float32 at most {_TOLERANCE} is rounding"
        )


def measure(options: argparse.Namespace, how: How, ways: Sequence[str], layers: str) -> dict[str, Any]:
    """One of the three modes."""
    if options.load_memory:
        memory = machine.fresh_process(memory_run, OURS, how, ())
        print_load_memory(memory, checkpoint_bytes(how.folder), layers)
        return {"load": asdict(memory), "checkpoint_bytes": checkpoint_bytes(how.folder)}
    rounds = 1 if options.agreement else options.repeats + 1
    pools = make_pools(how.images.folder, options.samples, options.reuse, options.seed, rounds)
    if options.agreement:
        found = agreement(how, pools[0])
        print_agreement(found)
        return {"agreement": asdict(found)}
    memories = {}
    for way in ways:
        print(f"memory: {way}", file=sys.stderr, flush=True)
        n = len(pools[0].rounds[0]) if way == OURS else how.baseline_samples
        memories[way] = machine.fresh_process(memory_run, way, how, pools[0].rounds[0][:n])
    n = min(options.samples, _BREAKDOWN_SAMPLES)
    (of_parts,) = make_pools(how.images.folder, n, [1], options.seed + 1, rounds)
    comparison = machine.fresh_process(comparison_run, how, pools, of_parts, ways)
    print_comparison(comparison, memories, how)
    return {
        "memory": {way: asdict(memory) for way, memory in memories.items()},
        "comparison": asdict(comparison),
    }


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.representation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=tuple(PRESETS), default="mid", help="what to generate (mid)")
    add("--checkpoint", type=Path, help="keep the generated checkpoint there, or use the one that is there")
    add("--folder", type=Path, help="where to put what is generated (the system's temporary folder)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=tuple(DTYPES_ON_DISK), help="to compute in (that of the weights on disk)")
    add("--samples", type=int, default=64, help="of ours (64)")
    add("--baseline-samples", type=int, default=8, help="of the whole model, the first ones (8)")
    add("--reuse", nargs="+", type=float, default=[1, 3], help="average samples per image (1 3)")
    add("--batch-tokens", type=int, default=4096)
    add("--workers", type=int, default=0, help="processes that prepare samples for ours (0: a thread)")
    add("--repeats", type=int, default=3, help="rounds that are counted, after one that is not (3)")
    add("--cores", type=int, help="cores to use (all)")
    add("--seed", type=int, default=0)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only-ours", dest="only", action="store_const", const=[OURS])
    only.add_argument("--only-baseline", dest="only", action="store_const", const=[STRAIGHTFORWARD])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--agreement", action="store_true", help="bfloat16 against float32 instead")
    mode.add_argument("--load-memory", action="store_true", help="memory of loading ours instead")
    add("--json", type=Path, help="also write all numbers there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
