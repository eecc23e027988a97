"""The strategies beside each other, as the report shows them."""

import polars as pl

from scalselect_assets.choice.advice import repetition
from scalselect_assets.choice.comparison import CHOICE, NAME, SUBSET_COMPARISON, means
from scalselect_assets.report.content import ComparedStrategy, Measure, StrategyTable
from scalselect_assets.resources.artifacts import ArtifactMissingError, ArtifactStore


def for_report(artifacts: ArtifactStore) -> StrategyTable | None:
    """The comparison as the report shows it; none where nothing was compared."""
    try:
        compared, _ = artifacts.read_frame(NAME)
    except ArtifactMissingError:
        return None
    if compared.is_empty():
        return None
    averages = means(compared)
    found = repetition(compared)
    names = [name for name in averages.columns if name not in {"strategy", "seeds"}]
    seeds = dict(compared.group_by("strategy").agg(pl.col("seed").drop_nulls().sort()).iter_rows())
    return StrategyTable(
        tuple(Measure(name, SUBSET_COMPARISON[name].description) for name in names),
        tuple(
            ComparedStrategy(
                name=row["strategy"],
                seeds=", ".join(map(str, seeds[row["strategy"]])),
                values=tuple(row[name] for name in names),
                is_selection=row["strategy"] == CHOICE,
            )
            for row in averages.iter_rows(named=True)
        ),
        ("" if found is None else f"{found.advice()} ")
        + "All strategies choose within the same budget and on the same terms; where one draws, the mean "
        "over its seeds is shown.",
    )
