"""The choice beside others of the same size and on the same terms: what each of them spans, covers, repeats.

High leverage is no proof of a good choice; these numbers, of the choice itself and of the comparators, are
what can be said of it before a model is trained. Strategies that draw are drawn several times. Costs: one
pass over the vectors of the pool to project them, one to read those of the chosen rows; n·k·4 bytes of
temporary disk; and an eigendecomposition of a d × d matrix for each strategy and seed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scalselect_assets.choice.pool_rows import PoolRows
from scalselect_assets.choice.projections import Projections
from scalselect_assets.declaration.choice_settings import DeclaredComparison
from scalselect_assets.recording.columns import Column, Table
from scalselect_assets.subspace import pool_moments

if TYPE_CHECKING:
    from scalselect_assets.method.choice.candidates import Candidates
    from scalselect_assets.method.choice.terms import Terms
    from scalselect_assets.method.subspace.basis import Subspace
    from scalselect_assets.method.subspace.moments import Moments


NAME = "subset_comparison"
CHOICE = "the choice"
_DRAWN = ("leverage_sampling", "random", "stratified_random")
_OWN_ROWS = 4096  # of a subset, for its own subspace; drawn from it where it has more

SUBSET_COMPARISON: Table = {
    "strategy": Column(pl.String(), "`the choice`, then what it is compared with, under the same terms."),
    "seed": Column(pl.Int64(), "Of a strategy that draws; null for the others."),
    "rows": Column(pl.Int64(), "Chosen rows."),
    "leverage_share": Column(pl.Float64(), "Their share of all leverage."),
    "directions": Column(pl.Int64(), "Dimension of what they span within the subspace, of its k."),
    "energy_contained": Column(pl.Float64(), "Share of the subspace's energy in directions that they span."),
    "weakest_direction": Column(
        pl.Float64(),
        "How strongly the worst represented direction is, relative to the pool: the smallest eigenvalue of "
        "(n/N)·Σuuᵀ; 1 is as in the pool, 0 is missing.",
    ),
    "mean_log_eigenvalue": Column(
        pl.Float64(), "The mean over directions of the logarithm of the same; null where one is missing."
    ),
    "energy_captured": Column(
        pl.Float64(),
        "Of the energy that the pool's k directions hold, the share that the subset's own k directions hold.",
    ),
    "projection_error": Column(
        pl.Float64(), "Relative error (Frobenius) of projecting the pool on the subset's own k directions."
    ),
    "sources_covered": Column(pl.Float64(), "Share of the pool's sources that are there."),
    "distinct_share": Column(
        pl.Float64(),
        "Different random cells of the subspace that the chosen rows lie in, for each row; 1 where no two "
        "rows share a cell.",
    ),
    "near_duplicate_rate": Column(pl.Float64(), "Share of the chosen rows with another one near them."),
    "shared_with_choice": Column(pl.Float64(), "Share of these rows that are in the choice, too."),
    "shared_with_last": Column(
        pl.Float64(), "Share of these rows that were in the last subset; null where there was none."
    ),
}


@dataclass(frozen=True, slots=True)
class Compared:
    """One subset to be measured."""

    strategy: str
    seed: int | None
    rows: NDArray[np.int64]


def alternatives(
    settings: DeclaredComparison,
    candidates: "Candidates",
    terms: "Terms",
    projections: Projections,
    *,
    seed: int,
    stratify_by: str,
) -> Iterator[Compared]:
    """The choices of other strategies under the same terms."""
    from scalselect_assets.method.choice.choose import choose
    from scalselect_assets.method.choice.strategies import strategy_named

    for name in settings.strategies:
        drawn = name in _DRAWN
        for one in range(seed, seed + settings.seeds) if drawn else [seed]:
            strategy = strategy_named(name, seed=one, stratify_by=stratify_by)
            rows = choose(candidates, strategy, terms, projections.blocks).rows
            yield Compared(name, one if drawn else None, rows)


def compare(
    subsets: Sequence[Compared],
    pool: PoolRows,
    rows: pl.DataFrame,
    candidates: "Candidates",
    subspace: "Subspace",
    projections: Projections,
    *,
    last: NDArray[np.int64] | None,
    settings: DeclaredComparison,
    source_label: str,
    unit_rows: bool,
) -> pl.DataFrame:
    """Measure subsets, the first of which is the choice.

    Args:
        subsets: Subsets of the pool's rows.
        pool: Reads vectors.
        rows: ``pool.all()``.
        candidates: The same rows.
        subspace: The present basis.
        projections: Projections of all rows on it.
        last: Rows of the last choice that are still there; ``None`` where there was none.
        settings: The cosine that counts as near.
        source_label: The label whose coverage is measured.
        unit_rows: Whether vectors are scaled to length 1.

    Returns:
        A frame of `SUBSET_COMPARISON`.
    """
    from scalselect_assets.method.choice.cells import cells_of
    from scalselect_assets.method.choice.subset_measures import (
        label_coverage,
        near_duplicate_rate,
        own_subspace_measures,
        shared_share,
        span_measures,
    )

    moments = pool_moments.stored(
        pool.artifacts, {shard: moments.data_version for shard, moments in pool.basis.shards.items()}
    )
    cells = cells_of(projections.blocks, rows.height, len(subsets[0].rows))
    sampled = [_sample(subset.rows) for subset in subsets]
    vectors = _vectors(sampled, pool, rows, unit_rows=unit_rows)

    def measured(chosen: NDArray[np.int64], own: NDArray[np.float32]) -> tuple[float | None, ...]:
        span = span_measures(projections.blocks, chosen, rows.height, subspace.singular_values)
        captured = own_subspace_measures(moments, _moments(own), subspace)

        def blocks() -> Iterator[NDArray[np.float64]]:
            return projections.of(chosen, subspace.singular_values)

        return (
            len(chosen),
            span.leverage_share,
            span.n_directions,
            span.energy_contained,
            span.smallest_eigenvalue,
            span.mean_log_eigenvalue if np.isfinite(span.mean_log_eigenvalue) else None,
            captured.energy_captured,
            captured.projection_error,
            label_coverage(candidates.labels[source_label], chosen),
            cells.distinct_share(chosen),
            near_duplicate_rate(blocks, len(chosen), threshold=settings.cosine),
            shared_share(chosen, subsets[0].rows),
            None if last is None else shared_share(chosen, last),
        )

    # The choice is mostly what one of the strategies gives, too.
    known: dict[bytes, tuple[float | None, ...]] = {}
    records = []
    for subset, own in zip(subsets, vectors, strict=True):
        content = np.sort(subset.rows).tobytes()
        if content not in known:
            known[content] = measured(subset.rows, own)
        records.append((subset.strategy, subset.seed, *known[content]))
    schema = {name: column.dtype for name, column in SUBSET_COMPARISON.items()}
    return pl.DataFrame(records, schema=schema, orient="row")


def _sample(chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most so many of the chosen rows, ascending."""
    if len(chosen) <= _OWN_ROWS:
        return np.sort(chosen)
    return np.sort(np.random.default_rng(0).choice(chosen, _OWN_ROWS, replace=False))


def _vectors(
    sampled: Sequence[NDArray[np.int64]], pool: PoolRows, rows: pl.DataFrame, *, unit_rows: bool
) -> list[NDArray[np.float32]]:
    """The vectors of each set of rows, (m, d), in one pass over the shards that have any."""
    from scalselect_assets.method.subspace.preprocessing import prepared_rows

    found: list[list[NDArray[np.float32]]] = [[] for _ in sampled]
    anywhere = np.zeros(rows.height, bool)
    anywhere[np.concatenate(sampled)] = True
    start = 0
    for (shard,), part in rows.group_by("shard", maintain_order=True):
        if anywhere[start : start + part.height].any():
            numbers = part["row"].to_numpy()
            wanted = [
                numbers[chosen[(chosen >= start) & (chosen < start + part.height)] - start]
                for chosen in sampled
            ]
            for batch in pool.embeddings.read(pool.table(str(shard))):
                for vectors, places in zip(found, wanted, strict=True):
                    here = np.isin(batch.row, places)
                    if here.any():
                        vectors.append(prepared_rows(batch.vector[here], to_unit_length=unit_rows))
        start += part.height
    return [np.concatenate(vectors) for vectors in found]


def _moments(x: NDArray[np.float32]) -> "Moments":
    from scalselect_assets.method.subspace.moments import Moments

    return Moments.of(x)


def means(comparison: pl.DataFrame) -> pl.DataFrame:
    """A line for each strategy: the mean over its seeds, in the order of the comparison."""
    measures = [name for name in comparison.columns if name not in {"strategy", "seed"}]
    return comparison.group_by("strategy", maintain_order=True).agg(
        pl.col("seed").count().alias("seeds"), *(pl.col(name).cast(pl.Float64).mean() for name in measures)
    )


def choice_numbers(comparison: pl.DataFrame) -> Mapping[str, float]:
    """The choice's own measures as plain numbers, for the UI to plot over time."""
    choice = comparison.row(0, named=True)
    return {
        name: float(value)
        for name, value in choice.items()
        if name not in {"strategy", "seed", "rows", "shared_with_choice"} and value is not None
    }
