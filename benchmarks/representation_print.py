"""The representation benchmark's results as Markdown."""

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.machine import GIB, MIB
from benchmarks.representation_results import Agreement, Breakdown, Memory, SpeedComparison
from benchmarks.two_ways import OURS, STRAIGHTFORWARD, How
from scalselect_assets.method.representation.loading import DeviceName, resolve_device


def describe(device: DeviceName) -> dict[str, str]:
    """Hardware, versions and threads, for a header; run it in a process of its own, it may start CUDA."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2] for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0))
    header = {
        "CPU": f"{cpu.strip() or platform.machine()}, {cores} cores used of {os.cpu_count()}",
        "load average before the run": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, Transformers "
        f"{transformers.__version__}, numpy {np.__version__}",
        "torch threads": str(torch.get_num_threads()),
        "device": "CPU",
    }
    if resolve_device(device).type == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
        header["device"] = f"{torch.cuda.get_device_name()}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
    return header


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A Markdown table, numbers to the right."""
    print("\n| " + " | ".join(columns) + " |\n|---|" + "---:|" * (len(columns) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def print_comparison(comparison: SpeedComparison, memories: Mapping[str, Memory], how: How) -> None:
    """Throughput, limit and breakdown."""
    _print_speeds(comparison, memories)
    if comparison.difference is not None:
        print(
            f"\nThe two ways' vectors differ by at most {comparison.difference:.1e} of a vector's largest "
            f"component ({how.dtype})."
        )
    if not comparison.tokens:
        return
    print(
        "A sample has on average {tokens:.0f} tokens: {vision_tokens:.0f} of vision, of which "
        "{dominant_tokens:.0f} are dominant, and {instruction_tokens:.0f} of the instruction.".format(
            **comparison.tokens
        )
    )
    _print_limit(comparison, how)
    if comparison.breakdown:
        _print_breakdown(comparison, comparison.breakdown, how)


def _print_speeds(comparison: SpeedComparison, memories: Mapping[str, Memory]) -> None:
    slow = next((speed for speed in comparison.speeds if speed.way == STRAIGHTFORWARD), None)
    rows = []
    for speed in comparison.speeds:
        memory = memories[speed.way]
        host = f"{(memory.peak - memory.resident_before) / MIB:,.0f}"
        rows.append(
            (
                speed.way,
                f"{speed.reuse:g}",
                f"{speed.n_samples}",
                f"{speed.mean_tokens:.0f}",
                f"{speed.best:.3g}",
                f"{speed.typical:.3g}",
                f"{speed.best / slow.best:.1f}" if slow else "",
                f"{memory.load_seconds:.1f}",
                host,
                "" if memory.device_peak is None else f"{memory.device_peak / MIB:,.0f}",
            )
        )
    print_table(
        (
            "",
            "samples per image",
            "samples",
            "tokens each",
            "samples/s, best",
            "median",
            "× whole model",
            "load s",
            "own MiB",
            "GPU MiB",
        ),
        rows,
    )


def _print_limit(comparison: SpeedComparison, how: How) -> None:
    rate = max(comparison.matmuls.values())
    name = max(comparison.matmuls, key=comparison.matmuls.__getitem__)
    best = {speed.reuse: speed.best for speed in comparison.speeds if speed.way == OURS}
    rows = []
    for reuse, work in comparison.work.items():
        for label, flops in (("needed", work.needed), ("whole layer", work.with_whole_layer)):
            limit = rate * 1e9 / flops
            parts = f"{work.tower / 1e9:.1f} + {(flops - work.tower) / 1e9:.1f}"
            reached = f"{best[reuse] / limit:.0%}"
            rows.append((label, f"{reuse:g}", parts, f"{flops / 1e9:.1f}", f"{limit:.3g}", reached))
    print_table(("flops", "samples per image", "tower + layer, GFLOP", "GFLOP", "limit", "reached"), rows)
    print(
        f"\nLimit: samples/s at {rate:,.0f} GFLOP/s, the fastest of these products in {how.dtype}, {name}. "
        "Needed: queries, keys and values of all tokens, the rest of the first layer for the dominant "
        "tokens alone, and the MLP's last projection for their mean. All products: "
        + ", ".join(f"{product} {rate:,.0f}" for product, rate in comparison.matmuls.items())
        + "."
    )


def _print_breakdown(comparison: SpeedComparison, parts: Breakdown, how: How) -> None:
    rate = max(comparison.matmuls.values()) * 1e9
    first = next(speed for speed in comparison.speeds if speed.way == OURS)
    work = comparison.work[first.reuse]
    whole = 1 / first.best
    rows = [
        ("preparation, one thread", parts.preparation, ""),
        ("vision tower and projector", parts.tower, f"{work.tower / rate / parts.tower:.0%}"),
        ("first layer", parts.layer, f"{work.layer / rate / parts.layer:.0%}"),
        ("rest", parts.rest, ""),
        ("end to end", whole, f"{work.needed / rate / whole:.0%}"),
    ]
    print_table(
        ("part of ours, alone", "ms per sample", "of its limit"),
        ((name, f"{seconds * 1e3:.2f}", reached) for name, seconds, reached in rows),
    )
    busy = (parts.tower + parts.layer) / whole
    print(
        f"\nThe model alone is {busy:.0%} of the time from end to end"
        + (" (how busy the GPU is). " if resolve_device(how.device).type == "cuda" else ". ")
        + f"Preparation would need {parts.preparation / (parts.tower + parts.layer):.1f} processes to keep "
        f"up with the model; it had {how.workers or 'a thread'}."
    )


def print_agreement(found: Agreement) -> None:
    """bfloat16 against float32."""
    print_table(
        ("samples", "k float32", "k bfloat16", "median difference", "largest", "top 16 % shared"),
        [
            (
                f"{found.n}",
                f"{found.ranks[0]}",
                f"{found.ranks[1]}",
                f"{found.typical:.1e}",
                f"{found.largest:.1e}",
                f"{found.overlap:.2%}",
            )
        ],
    )
    print(f"\nDifferences are of a vector's largest component. Scores by {found.by}.")


def print_load_memory(memory: Memory, on_disk: int, layers: str) -> None:
    """What ``load_encoder`` takes."""
    weights = memory.weights or 0
    before = memory.resident_before
    print_table(
        (
            "checkpoint MiB",
            "layers",
            "weights kept MiB",
            "peak while loading, own MiB",
            "of the checkpoint",
            "× weights kept",
            "resident afterwards, own MiB",
            "load s",
        ),
        [
            (
                f"{on_disk / MIB:,.0f}",
                layers,
                f"{weights / MIB:,.0f}",
                f"{(memory.loaded - before) / MIB:,.0f}",
                f"{(memory.loaded - before) / on_disk:.1%}",
                f"{(memory.loaded - before) / weights:.2f}",
                f"{(memory.resident_loaded - before) / MIB:,.0f}",
                f"{memory.load_seconds:.1f}",
            )
        ],
    )
    print("\nOwn: less what was resident with the libraries imported. Pages of mapped files count.")
