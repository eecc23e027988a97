"""Seconds and quality of every strategy over the number of rows.

``python -m benchmarks.strategy_costs`` plants near-duplicates of many directions, chooses the same share of
pools of growing size with each strategy, and prints a Markdown table: seconds by size, the exponent with
which they grow (1 is linear), the memory asked for beside the pool itself, and what the largest pool's
choice spans. The pool's projections are held in memory and given as blocks, as a store would give them.

Times are CPU seconds of the process, which other work on the machine changes little, the best of some rounds;
memory is what `tracemalloc` saw, in a run of its own, for the largest pool.
"""

import argparse
import json
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import machine
from scalselect_assets.method.choice.agreement import agree
from scalselect_assets.method.choice.candidates import Candidates, Labels
from scalselect_assets.method.choice.choose import Choice, choose
from scalselect_assets.method.choice.strategies import STRATEGIES, strategy_named
from scalselect_assets.method.choice.subset_measures import label_coverage, span_measures
from scalselect_assets.method.choice.terms import Budget, Quota, Terms

_SOURCES = 12
_NOISE = 0.3  # beside directions of length 1 in every coordinate


@dataclass(frozen=True, slots=True)
class StrategyPool:
    """Rows of U_k in groups of near-duplicates, few large groups and many small ones."""

    candidates: Candidates
    u: NDArray[np.float64]
    block_rows: int

    def blocks(self) -> Iterator[NDArray[np.float64]]:
        """The projections, as a store would give them."""
        return (self.u[start : start + self.block_rows] for start in range(0, len(self.u), self.block_rows))


def planted_pool(n: int, k: int, block_rows: int, seed: int) -> StrategyPool:
    """Rows about n/50 directions; the g-th direction has rows in proportion to 1/g."""
    rng = np.random.default_rng(seed)
    n_groups = max(2 * k, n // 50)
    frequency = 1 / np.arange(1, n_groups + 1)
    groups = rng.choice(n_groups, size=n, p=frequency / frequency.sum())
    rows = rng.normal(size=(n_groups, k))[groups] + _NOISE * rng.normal(size=(n, k))
    # Whitened by the Cholesky factor of the Gram matrix: any basis of the columns' span does.
    u = np.ascontiguousarray(np.linalg.solve(np.linalg.cholesky(rows.T @ rows), rows.T).T)
    tokens = rng.integers(5, 400, n)
    labels = {
        "group": Labels.of(f"{group:06d}" for group in groups.tolist()),
        "source": Labels.of(f"source {group % _SOURCES}" for group in groups.tolist()),
    }
    return StrategyPool(
        Candidates(np.square(u).sum(axis=1) * n / k, rng.permutation(n), tokens, tokens, labels),
        u,
        block_rows,
    )


def terms_by_name(pool: StrategyPool, share: float) -> dict[str, Terms]:
    """A plain budget, one with quotas on a column, and one of tokens."""
    quota = Quota("source", {"source 0": 0.3}, {"source 11": 0.08})
    return {
        "rows": agree(pool.candidates, Budget(share)),
        "quotas": agree(pool.candidates, Budget(share), [quota]),
        "tokens": agree(pool.candidates, Budget(share, "text_tokens")),
    }


def measure(pool: StrategyPool, name: str, terms: Terms, rounds: int) -> tuple[float, Choice]:
    """CPU seconds (the best round) and the choice."""
    strategy = strategy_named(name, stratify_by="source")
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        choice = choose(pool.candidates, strategy, terms, pool.blocks)
        seconds.append(time.process_time() - start)
    return min(seconds), choice


def peak_bytes(pool: StrategyPool, name: str, terms: Terms) -> int:
    """The most memory that a choice asks for at once, beside the pool."""
    tracemalloc.start()
    choose(pool.candidates, strategy_named(name, stratify_by="source"), terms, pool.blocks)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it as JSON if asked to."""
    options = parse_options(arguments)
    machine.use_cores(options.cores)
    pools = {n: planted_pool(n, options.k, options.block_rows, options.seed) for n in options.rows}
    largest = max(options.rows)
    results: list[dict[str, Any]] = []
    print(
        f"k = {options.k}, {options.share:.0%} chosen, blocks of {options.block_rows} rows, "
        f"{machine.use_cores(None)} cores; CPU seconds\n"
    )
    print(
        "| strategy | terms | "
        + " | ".join(f"{n:,} rows, s" for n in options.rows)
        + " | grows as n^ | MiB | groups covered | mean log eigenvalue | smallest eigenvalue |"
    )
    print("|---|---|" + "---:|" * (len(options.rows) + 5))
    for name in options.strategies:
        for kind in options.terms:
            measured = {
                n: measure(pool, name, terms_by_name(pool, options.share)[kind], options.rounds)
                for n, pool in pools.items()
            }
            seconds = [measured[n][0] for n in options.rows]
            exponent = float(np.polyfit(np.log(options.rows), np.log(seconds), 1)[0])
            pool, choice = pools[largest], measured[largest][1]
            rows = choice.rows
            span = span_measures(pool.blocks, rows, largest, np.ones(options.k))
            covered = label_coverage(pool.candidates.labels["group"], rows)
            mib = peak_bytes(pool, name, terms_by_name(pool, options.share)[kind]) / machine.MIB
            print(
                f"| {name} | {kind} | "
                + " | ".join(f"{value:.3f}" for value in seconds)
                + f" | {exponent:.2f} | {mib:.0f} | {covered:.1%} | {span.mean_log_eigenvalue:.3f} | "
                f"{span.smallest_eigenvalue:.3f} |"
            )
            results.append(
                {
                    "strategy": name,
                    "terms": kind,
                    "seconds": dict(zip(options.rows, seconds, strict=True)),
                    "exponent": exponent,
                    "mib": mib,
                    "groups_covered": covered,
                    "span": asdict(span),
                    "figures": dict(choice.figures),
                }
            )
    if options.json:
        options.json.write_text(json.dumps({"k": options.k, "results": results}, indent=1) + "\n")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.strategy_costs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rows", nargs="+", type=int, default=[10_000, 20_000, 40_000], help="sizes of the pools")
    add("--k", type=int, default=64, help="directions (64)")
    add("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    add("--share", type=float, default=0.16, help="of the rows, or tokens, that is chosen (0.16)")
    add("--terms", nargs="+", choices=("rows", "quotas", "tokens"), default=["rows", "quotas", "tokens"])
    add("--block-rows", type=int, default=1024, help="of the projections' stream (1024)")
    add("--rounds", type=int, default=3, help="the best of which counts (3)")
    add("--cores", type=int, help="cores to use (all)")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="also write all numbers there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
