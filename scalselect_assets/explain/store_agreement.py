"""The agreement of two stores' selections: for two target models, two settings or two nights.

Compares the samples that both stores have scored; a sample is the same where its shard and its key, a hash
of its content, are. Costs: the scores of both stores in memory, some 200 bytes a sample.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from scalselect_assets.choice import selected_subset
from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.subspace import importance_scores, subspace_basis

_SAMPLE = ["shard", "sample_key"]


@dataclass(frozen=True, slots=True)
class SourceAgreement:
    """Chosen samples of one source: in the first store, in the second, and in both."""

    first: int
    second: int
    both: int


@dataclass(frozen=True, slots=True)
class StoreAgreement:
    """The agreement of two selections over the samples that both stores have scored.

    Attributes:
        shared_samples: Number of these samples.
        only_first: Samples that only the first store has scored.
        only_second: Samples that only the second store has scored.
        first: Chosen samples of the first store among the shared ones.
        second: Chosen samples of the second store among them.
        both: Samples that both chose.
        by_chance: Number of samples that two random choices of these sizes share on average.
        rank_correlation: Spearman's ρ of the leverages; None where one of them is constant.
        sources: The chosen samples by source, as the store that chose them names it.
    """

    shared_samples: int
    only_first: int
    only_second: int
    first: int
    second: int
    both: int
    by_chance: float
    rank_correlation: float | None
    sources: Mapping[str, SourceAgreement]

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Labels and values for people."""
        ratio = f", {self.both / self.by_chance:.1f} times as many as by chance" if self.by_chance else ""
        smaller = min(self.first, self.second)
        share = f", {self.both / smaller:.1%} of the smaller choice" if smaller else ""
        correlation = "none" if self.rank_correlation is None else f"{self.rank_correlation:.3f}"
        return [
            (
                "samples in both",
                f"{self.shared_samples:,} ({self.only_first:,} only in the first, "
                f"{self.only_second:,} only in the second)",
            ),
            ("chosen", f"{self.first:,} in the first, {self.second:,} in the second"),
            ("chosen in both", f"{self.both:,}{share}{ratio} ({self.by_chance:,.1f})"),
            ("rank correlation", f"{correlation} (Spearman, of the leverages)"),
            *(
                (f"  {source}", f"{one.first:,} and {one.second:,}, {one.both:,} of them in both")
                for source, one in self.sources.items()
            ),
        ]


def agreement(first: ArtifactStore, second: ArtifactStore) -> StoreAgreement:
    """Compare the selections of two stores.

    Raises:
        ArtifactMissingError: A store has no selection yet.
        ValueError: The stores share no sample.
    """
    from scipy.stats import spearmanr

    scores = [_scores(store) for store in (first, second)]
    shared = scores[0].join(scores[1], on=_SAMPLE, suffix="_second", maintain_order="left")
    if shared.is_empty():
        raise ValueError(
            f"the stores {first.root} and {second.root} share no sample: they have no shard name and content "
            "in common; name two stores over the same pool"
        )
    chosen = [_chosen(store).join(shared, on=_SAMPLE, how="semi") for store in (first, second)]
    both = chosen[0].join(chosen[1], on=_SAMPLE, how="semi")
    leverages = [shared[name] for name in ("normalised_leverage", "normalised_leverage_second")]
    varied = all(leverage.n_unique() > 1 for leverage in leverages)
    return StoreAgreement(
        shared_samples=shared.height,
        only_first=scores[0].height - shared.height,
        only_second=scores[1].height - shared.height,
        first=chosen[0].height,
        second=chosen[1].height,
        both=both.height,
        by_chance=chosen[0].height * chosen[1].height / shared.height,
        rank_correlation=float(spearmanr(*leverages).statistic) if varied else None,
        sources=_by_source(chosen[0], chosen[1], both),
    )


def _scores(artifacts: ArtifactStore) -> pl.DataFrame:
    """Shard, key and leverage of every scored sample."""
    _, basis = subspace_basis.read_basis(artifacts)
    return pl.concat(
        importance_scores.read_scores(
            artifacts, basis.data_version, shard, ["sample_key", "normalised_leverage"]
        ).select(pl.lit(shard).alias("shard"), "sample_key", "normalised_leverage")
        for shard in sorted(basis.shards)
    )


def _chosen(artifacts: ArtifactStore) -> pl.DataFrame:
    """Shard, key and source of every chosen sample."""
    return artifacts.read_frame(selected_subset.NAME, columns=[*_SAMPLE, "source"])[0]


def _by_source(first: pl.DataFrame, second: pl.DataFrame, both: pl.DataFrame) -> dict[str, SourceAgreement]:
    counts = [dict(chosen.group_by("source").len().iter_rows()) for chosen in (first, second, both)]
    sources = sorted({source for of_source in counts for source in of_source}, key=str)
    return {
        str(source): SourceAgreement(*(of_source.get(source, 0) for of_source in counts))
        for source in sources
    }
