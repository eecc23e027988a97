"""The profile of leverage scores that the report shows."""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scalselect_assets.charts.chart_data import LeverageProfile
from scalselect_assets.report.distribution import LeverageCounts
from scalselect_assets.resources.artifacts import ArtifactStore
from scalselect_assets.subspace import importance_scores

GALLERY_SIZE: Final = 8


class ReportScores:
    """The scores of all shards, read shard by shard and never held."""

    _COLUMNS: Final = ("row", "sample_key", "leverage", "normalised_leverage")

    def __init__(self, artifacts: ArtifactStore, basis_version: str, shards: Sequence[str], n: int) -> None:
        """The ``n`` scores of ``shards``, which must be of the basis of that version."""
        self._artifacts, self._basis_version, self._shards, self._n = artifacts, basis_version, shards, n

    def profile_and_picks(self, subset: pl.DataFrame) -> tuple[LeverageProfile, pl.DataFrame]:
        """The distribution of leverage, and the samples for the galleries.

        Args:
            subset: The selected samples: shard, row and normalised_leverage.

        Returns:
            The profile; and a frame of shard, row, sample_key, leverage, normalised_leverage, rank (by
            normalised leverage over the pool, ties by key and shard) and gallery, highest first.
        """
        from scalselect_assets.method.choice.top_n import nth_largest

        # Half the samples have at least this much, the upper one of two where the pool is even.
        median = nth_largest(self._normalised, (self._n + 1) // 2).value
        pool, total = LeverageCounts(), 0.0
        best = dict.fromkeys(("highest", "median", "lowest"), self._none())
        for frame in self._frames(self._COLUMNS):
            pool.add(frame["normalised_leverage"].to_numpy())
            total += float(frame["normalised_leverage"].sum())
            best = {name: self._best(so_far, frame, name, median) for name, so_far in best.items()}
        chosen = LeverageCounts()
        normalised = subset["normalised_leverage"].to_numpy()
        chosen.add(normalised)
        picks = pl.concat(
            frame.drop("order").with_columns(gallery=pl.lit(name)) for name, frame in best.items()
        )
        # Of the last selected sample, only how many are above it counts.
        least = float(normalised.min()) if len(normalised) else 0.0
        above, ranks = self._counted_before(picks, least)
        picks = picks.with_columns(rank=pl.Series(ranks, dtype=pl.Int64)).sort("rank")
        scores = picks["normalised_leverage"]
        curve = dict(zip(*pool.rank_curve(), strict=True))
        if curve:
            curve |= {1: float(scores[0]), self._n: float(scores[-1])}  # the ends are known exactly
        profile = LeverageProfile(
            bins=pool.bins(chosen),
            ranks=tuple(sorted(rank for rank, value in curve.items() if value > 0)),
            values=tuple(value for _, value in sorted(curve.items()) if value > 0),
            cut=least if above < subset.height else None,
            leverage_share=float(normalised.sum()) / total if total else 0.0,
        )
        return profile, picks

    def _best(self, so_far: pl.DataFrame, frame: pl.DataFrame, gallery: str, median: float) -> pl.DataFrame:
        """The rows that a gallery shows, of those before and those of another shard."""
        score = pl.col("normalised_leverage")
        order = {"highest": -score, "median": (score - median).abs(), "lowest": score}[gallery]
        # The lowest are the last in the order of ranks, so their ties are broken the other way round.
        last = gallery == "lowest"
        more = frame.with_columns(order=order)
        if so_far.height == GALLERY_SIZE:
            more = more.filter(pl.col("order") <= so_far["order"][-1])
        return (
            pl.concat([so_far, more])
            .sort(["order", "sample_key", "shard"], descending=[False, last, last])
            .head(GALLERY_SIZE)
        )

    def _counted_before(self, picks: pl.DataFrame, least: float) -> tuple[int, list[int]]:
        """The number of samples of the pool above ``least``, and the rank of each of ``picks``."""
        wanted = list(picks.select("normalised_leverage", "sample_key", "shard").iter_rows())
        values = np.unique(picks["normalised_leverage"].to_numpy())
        above, ranks = 0, [1] * len(wanted)
        for shard in self._shards:
            score = self._read(shard, ("normalised_leverage",))["normalised_leverage"].to_numpy()
            above += int(np.count_nonzero(score > least))
            larger = {value: int(np.count_nonzero(score > value)) for value in values.tolist()}
            # Keys, the widest column, are needed of the rows only that have the score of one of the picks.
            tied: list[tuple[float, str]] = []
            if np.isin(score, values).any():
                frame = self._read(shard, ("normalised_leverage", "sample_key"))
                tied = frame.select("normalised_leverage", "sample_key").filter(np.isin(score, values)).rows()
            for place, (value, key, of_shard) in enumerate(wanted):
                ranks[place] += larger[value] + sum(
                    other == value and (other_key, shard) < (key, of_shard) for other, other_key in tied
                )
        return above, ranks

    def _normalised(self) -> Iterator[NDArray[np.float64]]:
        for frame in self._frames(("normalised_leverage",)):
            yield frame["normalised_leverage"].to_numpy()

    def _frames(self, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        return (self._read(shard, columns) for shard in self._shards)

    def _read(self, shard: str, columns: Sequence[str]) -> pl.DataFrame:
        frame = importance_scores.read_scores(self._artifacts, self._basis_version, shard, list(columns))
        return frame.select(pl.lit(shard).alias("shard"), *columns)

    @staticmethod
    def _none() -> pl.DataFrame:
        return pl.DataFrame(
            schema={
                "shard": pl.String,
                "row": pl.Int64,
                "sample_key": pl.String,
                "leverage": pl.Float64,
                "normalised_leverage": pl.Float64,
                "order": pl.Float64,
            }
        )
