"""A cost model of the path: bytes, flops and seconds of each asset, and what follows for a billion samples.

``python -m benchmarks.simulate`` prints the tables of ``docs/scaling.md``. The model is a sum of products, in
`costs`; what it multiplies with are the `Constants`, each of which names its source. ``--json FILE`` takes
those that can be measured from what ``benchmarks.scale --json FILE`` wrote; ``--check FILE`` compares the
model with another such run, of another size. Everything beyond the measured pool is extrapolated: linearly in
the rows and in the shards, in d² for moments and in d³ for eigenvectors, on one machine like the measured
one, or on several where work is independent by shard.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

MEASURED_RUN = "measured: 40,000 × 4096 in 8 shards, on the 2 cores of docs/benchmarks.md"
ASSUMED = "assumed, not measured"

DAGSTER_PARTITIONS = 100_000
"""Partitions of one asset that Dagster is documented to handle."""

BUDGET = 0.16  # arXiv 2602.11636
SIZES = (10**6, 10**7, 10**8, 10**9)


def measured(value: float) -> float:
    """A constant that ``--json`` replaces."""
    return field(default=value, metadata={"source": MEASURED_RUN})


def given(value: float, source: str) -> float:
    """A constant that stays."""
    return field(default=value, metadata={"source": source})


@dataclass(frozen=True, slots=True)
class Constants:
    """What the model multiplies with; seconds and rates are of one machine."""

    raw_seconds_per_row: float = measured(0.000389)
    image_seconds: float = measured(0.0114)
    open_seconds_per_shard: float = measured(0.00725)
    read_bytes_per_second: float = measured(588000000.0)
    write_bytes_per_second: float = measured(385000000.0)
    hash_bytes_per_second: float = measured(687000000.0)
    moments_flops_per_second: float = measured(67000000000.0)
    moments_seconds_per_d2: float = measured(4.7e-09)
    totals_seconds_per_value: float = measured(6.02e-08)
    headers_seconds_per_shard: float = measured(0.000286)
    eigen_seconds_per_d3: float = measured(6.3e-11)
    basis_rest_seconds: float = measured(6.61)
    update_rest_seconds: float = measured(6.25)
    moments_rest_seconds_per_shard: float = measured(0.613)
    scores_flops_per_second: float = measured(81300000000.0)
    scores_write_seconds_per_row: float = measured(1.46e-06)
    scores_rest_seconds_per_shard: float = measured(0.0984)
    selection_seconds_per_row: float = measured(5.77e-07)
    selection_seconds_per_shard: float = measured(0.0191)
    selected_row_memory: float = measured(484.0)
    run_seconds: float = measured(0.486)
    range_seconds_per_shard: float = measured(0.0781)
    score_row_bytes: float = measured(37.8)
    vector_row_overhead_bytes: float = measured(72.5)

    embedding_flops_per_second: float = given(
        2.5e14, f"{ASSUMED}: a quarter of an H100's dense bfloat16 peak of 989 TFLOP/s"
    )
    image_workers: float = given(
        15.0, "the default on a GPU machine of 16 cores: one process per core but one"
    )
    image_bytes: float = given(1.5e5, f"{ASSUMED}: a JPEG of 640 × 480, about")
    text_bytes: float = given(1.5e3, "LLaVA-665K: about 1 GB of JSON for 665,000 rows")
    tokens: float = given(750.0, f"{ASSUMED}: 576 vision tokens of LLaVA-1.5 and some text")

    @classmethod
    def from_scale(cls, results: Mapping[str, Any]) -> "Constants":
        """Those that a run of ``benchmarks.scale`` shows; the others keep their values."""
        parts, path, pool = results["parts"], _by_asset(results["path"]), results["pool"]
        d, shards = pool["dim"], pool["shards"]
        packed = d * (d + 1) / 2
        moments, scores = path["embedding_moments"], path["importance_scores"]
        rates = ("read", "write", "hash")
        run_seconds = (moments["seconds"] - moments["asset_seconds"]) / moments["runs"]
        constants = cls(
            raw_seconds_per_row=results["raw"]["asset_seconds"] / results["raw"]["rows"],
            image_seconds=parts["image_seconds"],
            open_seconds_per_shard=parts["open_seconds_per_shard"],
            **{f"{rate}_bytes_per_second": parts[f"{rate}_bytes_per_second"] for rate in rates},
            moments_flops_per_second=parts["moments_flops_per_second"],
            moments_seconds_per_d2=parts["moments_seconds_per_shard"] / d**2,
            totals_seconds_per_value=parts["totals_seconds_per_value"],
            headers_seconds_per_shard=parts["headers_seconds_per_shard"],
            eigen_seconds_per_d3=parts["eigen_seconds"] / d**3,
            scores_flops_per_second=parts["scores_flops_per_second"],
            scores_write_seconds_per_row=parts["scores_write_seconds_per_row"],
            run_seconds=run_seconds,
            range_seconds_per_shard=max(scores["seconds"] - scores["asset_seconds"] - run_seconds, 0.0)
            / shards,
            score_row_bytes=results["disk"]["importance_scores"] / pool["rows"],
        )
        # A second pass leaves the tables of the replaced shards in two versions.
        written = pool["rows"] + sum(one["rows"] for one in results["again"][:1])
        constants = replace(constants, vector_row_overhead_bytes=results["disk"]["lance"] / written - 4 * d)
        known = constants.headers_seconds_per_shard * shards + parts["eigen_seconds"]
        adding = constants.totals_seconds_per_value * packed
        rest = max(path["subspace_basis"]["asset_seconds"] - known - adding * shards, 0.0)
        constants = replace(constants, basis_rest_seconds=rest, update_rest_seconds=rest)
        if results["again"]:
            again = _by_asset(results["again"])
            touched = 2 * again["embedding_moments"]["runs"] * adding  # out and in
            rest = again["subspace_basis"]["asset_seconds"] - known - touched
            constants = replace(constants, update_rest_seconds=max(rest, 0.0))
        if alone := results["selection"]:
            selected = alone["metadata"]["dagster/row_count"]
            constants = replace(
                constants,
                selection_seconds_per_row=alone["asset_seconds"] / alone["rows"],
                selected_row_memory=(alone["peak"] - alone["resident_before"]) / selected,
            )
        # What the loops, taken apart, leave unexplained of these three is counted by shard.
        pool_of_run = SimulatedPool.of(results)
        model = {cost.asset: cost.seconds() for cost in everything(pool_of_run, constants.without_rest())}
        left = {
            asset: max(path[asset]["asset_seconds"] - model[asset], 0.0) / shards
            for asset in ("embedding_moments", "importance_scores", "selected_subset")
        }
        return replace(
            constants,
            moments_rest_seconds_per_shard=left["embedding_moments"],
            scores_rest_seconds_per_shard=left["importance_scores"],
            selection_seconds_per_shard=left["selected_subset"],
        )

    def without_rest(self) -> "Constants":
        """Only what was measured loop by loop."""
        return replace(
            self,
            moments_rest_seconds_per_shard=0.0,
            scores_rest_seconds_per_shard=0.0,
            selection_seconds_per_shard=0.0,
        )

    def sources(self, *, from_file: bool) -> list[tuple[str, float, str]]:
        """Name, value and source of each."""
        return [
            (
                one.name,
                getattr(self, one.name),
                "the measured run"
                if from_file and one.metadata["source"] == MEASURED_RUN
                else one.metadata["source"],
            )
            for one in fields(self)
        ]


@dataclass(frozen=True, slots=True)
class SimulatedPool:
    """The pool that is computed, or the part of it that is new."""

    n: int
    d: int
    k: int
    shard_rows: int

    @classmethod
    def of(cls, results: Mapping[str, Any]) -> "SimulatedPool":
        """The one that ``benchmarks.scale`` ran."""
        pool = results["pool"]
        return cls(pool["rows"], pool["dim"], int(results["parts"]["directions"]), pool["shard_rows"])

    @property
    def shards(self) -> int:
        """Rounded up."""
        return -(-self.n // self.shard_rows)

    @property
    def packed_bytes(self) -> int:
        """Moments of one shard: the upper triangle in float64."""
        return self.d * (self.d + 1) // 2 * 8


@dataclass(frozen=True, slots=True)
class SimulatedCost:
    """Of one asset.

    Attributes:
        asset: Its name, or what else costs time.
        stored: Bytes that it leaves.
        read: Bytes that it reads.
        flops: A multiplication and an addition counted apart.
        shared: Seconds of one machine that several can share.
        serial: Seconds that they cannot.
    """

    asset: str
    stored: float
    read: float
    flops: float
    shared: float
    serial: float = 0.0

    def seconds(self, machines: int = 1) -> float:
        """With so many machines, each with its share of the shards."""
        return self.shared / machines + self.serial


def embedding_flops(tokens: float) -> float:
    """One sample through a ViT-L/14 at 336 pixels, the projector and one layer of LLaVA-1.5-7B.

    At most: the rest of the layer after its projections is run for the dominant vision tokens alone.

    Weights twice per token, and two products of tokens² times width per attention.
    """
    patches, width, layers = 577, 1024, 24
    vision = layers * (2 * 12 * width**2 * patches + 4 * patches**2 * width)
    d, hidden = 4096, 11_008
    projector = 2 * 576 * (width * d + d**2)
    layer = 2 * tokens * (4 * d**2 + 3 * d * hidden) + 4 * tokens**2 * d
    return vision + projector + layer


def costs(whole: SimulatedPool, new: SimulatedPool, c: Constants, *, rebuild: bool) -> list[SimulatedCost]:
    """What a refresh costs in which ``new`` is the part of the ``whole`` pool that has to be embedded.

    The basis moves with any new sample, so all scores are made again.
    """
    n, d, k = new.n, new.d, new.k
    sample = embedding_flops(c.tokens)
    vectors, moments = 4.0 * n * d, float(new.shards * new.packed_bytes)
    moment_flops, score_flops = float(n) * d * (d + 1), 2.0 * whole.n * d * k
    added = whole.shards if rebuild else new.shards
    totals_bytes = 2.0 * whole.packed_bytes  # kept as sums of two numbers
    return [
        SimulatedCost("raw_samples", n * c.text_bytes, n * c.text_bytes, 0, n * c.raw_seconds_per_row),
        SimulatedCost(
            "attention_embeddings",
            vectors + n * (c.vector_row_overhead_bytes + c.text_bytes),
            n * (c.image_bytes + c.text_bytes),
            n * sample,
            n * _sample_seconds(c.image_seconds, sample / c.embedding_flops_per_second, c.image_workers)
            + vectors / c.hash_bytes_per_second
            + vectors / c.write_bytes_per_second,
        ),
        SimulatedCost(
            "embedding_moments",
            moments,
            vectors,
            moment_flops,
            vectors / c.read_bytes_per_second
            + moment_flops / c.moments_flops_per_second
            + new.shards * (c.open_seconds_per_shard + c.moments_rest_seconds_per_shard)
            + new.shards * c.moments_seconds_per_d2 * d**2
            + moments / c.hash_bytes_per_second
            + moments / c.write_bytes_per_second,
        ),
        SimulatedCost(
            "subspace_basis",
            totals_bytes + 8.0 * d * k,
            float(added * new.packed_bytes),
            4 / 3 * float(d) ** 3 + 2.0 * d**2 * k,
            0.0,
            whole.shards * c.headers_seconds_per_shard
            + added * c.totals_seconds_per_value * new.packed_bytes / 8
            + c.eigen_seconds_per_d3 * d**3
            + (c.basis_rest_seconds if rebuild else c.update_rest_seconds),
        ),
        SimulatedCost(
            "importance_scores",
            whole.n * c.score_row_bytes,
            4.0 * whole.n * d,
            score_flops,
            4.0 * whole.n * d / c.read_bytes_per_second
            + score_flops / c.scores_flops_per_second
            + whole.n * c.scores_write_seconds_per_row
            + whole.shards * (c.open_seconds_per_shard + c.scores_rest_seconds_per_shard),
        ),
        SimulatedCost(
            "selected_subset",
            BUDGET * whole.n * c.score_row_bytes,
            3 * whole.n * c.score_row_bytes,  # files are read whole in each of three passes
            0,
            0.0,
            whole.n * c.selection_seconds_per_row + whole.shards * c.selection_seconds_per_shard,
        ),
        SimulatedCost("Dagster, runs by shard", 0, 0, 0, new.shards * c.run_seconds),
        SimulatedCost("Dagster, the range of scores", 0, 0, 0, whole.shards * c.range_seconds_per_shard),
    ]


def _sample_seconds(image: float, forward: float, workers: float) -> float:
    """Images are prepared while the model works, so that the slower of the two counts."""
    return max(image / workers, forward)


def everything(pool: SimulatedPool, c: Constants) -> list[SimulatedCost]:
    """The first refresh of a pool."""
    return costs(pool, pool, c, rebuild=True)


def shard_rows_for(n: int, d: int, least: int) -> int:
    """Rows per shard such that moments stay a tenth of the vectors, and partitions within Dagster's limit.

    A shard's moments are as large as d + 1 of its vectors. Small pools keep ``least``: their moments are
    cheap, and a changed shard is embedded as a whole.
    """
    if n < 10**8:
        return least
    return max(least, 10 * (d + 1), -(-n // DAGSTER_PARTITIONS))


# --- Tables -------------------------------------------------------------------------------------------------


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Markdown; the first column is text, the others are numbers."""
    print(f"\n| {' | '.join(header)} |")
    print("|---|" + "---:|" * (len(header) - 1))
    for row in rows:
        print(f"| {' | '.join(row)} |")


def in_bytes(value: float) -> str:
    """A number of bytes with a decimal unit."""
    return _in_units(value, ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")), "B")


def in_seconds(value: float) -> str:
    """A duration with the unit that a person would choose."""
    return _in_units(value, ((365.25 * 86400, "years"), (2 * 86400, "d"), (2 * 3600, "h"), (120, "min")), "s")


def in_flops(value: float) -> str:
    """A number of flops with a decimal prefix."""
    return _in_units(value, ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")), "")


def _in_units(value: float, units: Sequence[tuple[float, str]], below: str) -> str:
    if value == 0:
        return "–"
    least, unit = next(((least, unit) for least, unit in units if value >= least), (1.0, below))
    scale = {"d": 86400.0, "h": 3600.0, "min": 60.0}.get(unit, least)
    return f"{value / scale:.3g} {unit}".strip()


def print_constants(c: Constants, *, from_file: bool) -> None:
    """Every number that the tables come from."""
    print("\n### Constants")
    rows = c.sources(from_file=from_file)
    print("\n| constant | value | source |\n|---|---:|---|")
    for name, value, source in rows:
        print(f"| {name.replace('_', ' ')} | {value:.3g} | {source} |")


def print_check(results: Mapping[str, Any], c: Constants, *, own: bool) -> None:
    """The model's seconds beside those of a run, without Dagster's."""
    if own:
        print("\n### The run that the constants come from, and what of it the loops explain")
        c = c.without_rest()
    else:
        print("\n### Another run, as the model predicts it")
    pool, path = SimulatedPool.of(results), _by_asset(results["path"])
    print(f"\n{pool.n} × {pool.d} in {pool.shards} shards, k = {pool.k}.")
    rows = [
        (
            cost.asset,
            f"{cost.seconds():.2f}",
            f"{path[cost.asset]['asset_seconds']:.2f}",
            f"{cost.seconds() / path[cost.asset]['asset_seconds']:.0%}",
        )
        for cost in everything(pool, c)
        if cost.asset in path
    ]
    print_table(("asset", "model s", "measured s", "model / measured"), rows)


def print_per_million(pool: SimulatedPool, c: Constants) -> None:
    """Each asset, of a million samples."""
    print(f"\n### A million samples (d = {pool.d}, k = {pool.k}, {pool.shards} shards of {pool.shard_rows})")
    rows = [
        (
            cost.asset,
            in_bytes(cost.stored),
            in_bytes(cost.read),
            in_flops(cost.flops),
            f"{cost.seconds():,.0f}",
        )
        for cost in everything(pool, c)
    ]
    print_table(("asset", "stored", "read", "flops", "seconds"), rows)


def print_totals(pools: Sequence[SimulatedPool], c: Constants, machines: int) -> None:
    """The first refresh at each size, on one machine and on several."""
    print(f"\n### The first refresh, on 1 and on {machines} machines")
    per_pool = [everything(pool, c) for pool in pools]
    header = ("asset", *(f"{pool.n:.0e}, {m}".replace("e+0", "e") for pool in pools for m in (1, machines)))
    rows = [
        (
            per_pool[0][index].asset,
            *(in_seconds(of_pool[index].seconds(m)) for of_pool in per_pool for m in (1, machines)),
        )
        for index in range(len(per_pool[0]))
    ]
    sums = [
        in_seconds(sum(cost.seconds(m) for cost in of_pool)) for of_pool in per_pool for m in (1, machines)
    ]
    worst = [
        max(of_pool, key=lambda cost, m=m: cost.seconds(m)).asset  # type: ignore[misc]
        for of_pool in per_pool
        for m in (1, machines)
    ]
    rows += [("**together**", *sums), ("longest", *worst)]
    print_table(header, rows)
    stored = [
        (
            cost.asset,
            *(in_bytes(of_pool[index].stored) for of_pool in per_pool),
        )
        for index, cost in enumerate(per_pool[0])
        if cost.stored
    ]
    print_table(("stored by", *(f"{pool.n:.0e}".replace("e+0", "e") for pool in pools)), stored)
    about = [
        ("shards", *(f"{pool.shards:,}" for pool in pools)),
        ("rows per shard", *(f"{pool.shard_rows:,}" for pool in pools)),
        (
            "moments / vectors",
            *(f"{pool.packed_bytes / (4 * pool.d * pool.shard_rows):.0%}" for pool in pools),
        ),
        (
            "memory of the selected rows",
            *(in_bytes(BUDGET * pool.n * c.selected_row_memory) for pool in pools),
        ),
    ]
    print_table(("", *(f"{pool.n:.0e}".replace("e+0", "e") for pool in pools)), about)


def print_nightly(pools: Sequence[SimulatedPool], c: Constants, share: float, machines: int) -> None:
    """A refresh after the pool has grown by a share of itself."""
    print(f"\n### A refresh after the pool has grown by {share:.0%}, one machine (and {machines})")
    header = (
        "samples",
        "new",
        "embedding",
        "moments",
        "basis, totals updated",
        "basis, rebuilt",
        "scores",
        "selection",
        "Dagster's",
        "together",
    )
    rows = []
    for pool in pools:
        new = replace(pool, n=max(1, int(share * pool.n)))
        update = {cost.asset: cost for cost in costs(pool, new, c, rebuild=False)}
        again = {cost.asset: cost for cost in costs(pool, new, c, rebuild=True)}
        dagster = [cost for name, cost in update.items() if name.startswith("Dagster")]

        def shown(chosen: Iterable[SimulatedCost]) -> str:
            chosen = tuple(chosen)
            alone, together = (sum(cost.seconds(m) for cost in chosen) for m in (1, machines))
            return in_seconds(alone) + ("" if alone == together else f" ({in_seconds(together)})")

        rows.append(
            (
                f"{pool.n:.0e}".replace("e+0", "e"),
                f"{new.n:,}",
                shown([update["raw_samples"], update["attention_embeddings"]]),
                shown([update["embedding_moments"]]),
                shown([update["subspace_basis"]]),
                shown([again["subspace_basis"]]),
                shown([update["importance_scores"]]),
                shown([update["selected_subset"]]),
                shown(dagster),
                shown(update.values()),
            )
        )
    print_table(header, rows)


def print_shard_sizes(n: int, d: int, k: int, c: Constants, machines: int) -> None:
    """What the rows per shard decide."""
    print(f"\n### Rows per shard, at {n:.0e} samples")
    rows = []
    for shard_rows in (5000, 10_000, 20_000, 50_000, 100_000):
        pool = SimulatedPool(n, d, k, shard_rows)
        by_name = {cost.asset: cost for cost in everything(pool, c)}
        sample = by_name["attention_embeddings"].seconds() / n
        rows.append(
            (
                f"{shard_rows:,}",
                f"{pool.shards:,}" + (" (too many)" if pool.shards > DAGSTER_PARTITIONS else ""),
                in_bytes(by_name["embedding_moments"].stored),
                f"{by_name['embedding_moments'].stored / (4.0 * n * d):.0%}",
                in_seconds(by_name["subspace_basis"].seconds()),
                in_seconds(
                    sum(cost.seconds() for name, cost in by_name.items() if name.startswith("Dagster"))
                ),
                in_seconds(by_name["embedding_moments"].seconds(machines)),
                in_seconds(sample * shard_rows),
            )
        )
    print_table(
        (
            "rows",
            "shards",
            "moments",
            "of the vectors",
            "rebuilding the basis",
            "Dagster's, one machine",
            f"moments, {machines} machines",
            "embedding one changed shard",
        ),
        rows,
    )


def _by_asset(measurements: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {one["asset"]: one for one in measurements}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every table."""
    options = parse_options(arguments)
    results = json.loads(options.json.read_text()) if options.json else None
    constants = Constants.from_scale(results) if results else Constants()
    if options.image_workers:
        constants = replace(constants, image_workers=float(options.image_workers))
    if options.embedding_tflops:
        constants = replace(constants, embedding_flops_per_second=options.embedding_tflops * 1e12)
    print_constants(constants, from_file=results is not None)
    if results:
        print_check(results, constants, own=True)
    if options.check:
        print_check(json.loads(options.check.read_text()), constants, own=False)
    d, k = options.dim, options.directions
    print_per_million(SimulatedPool(10**6, d, k, options.shard_rows), constants)
    pools = [SimulatedPool(n, d, k, shard_rows_for(n, d, options.shard_rows)) for n in SIZES]
    print_totals(pools, constants, options.machines)
    print_nightly(pools, constants, options.growth, options.machines)
    print_shard_sizes(SIZES[-1], d, k, constants, options.machines)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--json", type=Path, help="take the constants from a run of benchmarks.scale")
    add("--check", type=Path, help="compare the model with another run of benchmarks.scale")
    add("--image-workers", type=int, help="processes that decode ahead (15)")
    add("--dim", type=int, default=4096, help="d (4096, that of LLaVA-1.5-7B)")
    add("--directions", type=int, default=100, help="k (100)")
    add("--shard-rows", type=int, default=5000, help="of pools below 1e8 samples (5000)")
    add("--machines", type=int, default=64, help="that share the work by shard (64)")
    add("--growth", type=float, default=0.01, help="share of the pool that is new each night (0.01)")
    add("--embedding-tflops", type=float, help="reached by the forward pass, in 1e12 per second")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
