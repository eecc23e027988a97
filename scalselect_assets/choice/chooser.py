"""The choice over the whole pool, and its comparison with other strategies."""

from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any

import dagster as dg
import numpy as np
import polars as pl
from numpy.typing import NDArray

from scalselect_assets.choice import comparison
from scalselect_assets.choice.lists import Listed, Lists, find_listed
from scalselect_assets.choice.pool_rows import PoolRows, candidates
from scalselect_assets.choice.projections import Projections
from scalselect_assets.declaration.selection import Selection
from scalselect_assets.recording.columns import SELECTED_SUBSET, column_schema, polars_schema
from scalselect_assets.subspace.sample_directions import directions_of_rows

if TYPE_CHECKING:
    from scalselect_assets.method.choice.choose import Choice
    from scalselect_assets.method.choice.terms import Terms
    from scalselect_assets.method.subspace.basis import Subspace


class Chooser:
    """Chooses from the whole pool, and describes what was chosen.

    Attributes:
        rows: Every embedded row of the pool.
        unknown: Entries of the lists that name none.
    """

    def __init__(
        self,
        selection: Selection,
        pool: PoolRows,
        subspace: "Subspace",
        lists: Lists,
        removed: pl.DataFrame,
        before: pl.DataFrame | None,
        stack: ExitStack,
    ) -> None:
        self._selection, self._pool, self._subspace, self._stack = selection, pool, subspace, stack
        self.rows = pool.all()
        self._candidates = candidates(self.rows, selection.labels)
        self._include, self._exclude = self._listed(lists.include), self._listed(lists.exclude)
        self.unknown = self._include.unknown + self._exclude.unknown
        if lists.exclude and not len(self._exclude.rows):
            shown = ", ".join(map(repr, lists.exclude[:3]))
            raise dg.Failure(
                f"none of the {len(lists.exclude)} entries of the list to exclude names an embedded row (the "
                f"first are {shown}), so everything that it is to keep out could be chosen; an entry is a "
                "source id, a sample key or the SHA-256 of an image. Correct the list or leave it out.",
                allow_retries=False,
            )
        self._removed = self._places(removed)
        self._n_removed = removed.height
        self._earlier = None if before is None else self._places(before)
        self._opened: Projections | None = None

    @cached_property
    def _terms(self) -> "Terms":
        from scalselect_assets.method.choice.agreement import agree

        return agree(
            self._candidates,
            self._selection.declared_budget,
            [quota.to_quota(self._selection.source_label) for quota in self._selection.quotas],
            include=self._include.rows,
            exclude=np.union1d(self._exclude.rows, self._removed),
        )

    def choose(self) -> "Choice":
        """Choose as the selection declares.

        Raises:
            dg.Failure: The terms cannot be met.
        """
        from scalselect_assets.method.choice.choose import choose
        from scalselect_assets.method.choice.strategies import strategy_named
        from scalselect_assets.method.choice.terms import InfeasibleError

        selection = self._selection
        strategy = strategy_named(selection.strategy, seed=selection.seed, stratify_by=selection.source_label)
        declared = None if self._earlier is None else selection.keep_earlier
        try:
            return choose(
                self._candidates,
                strategy,
                self._terms,
                self._projections().blocks if strategy.needs_projections else None,
                earlier=self._earlier if declared is not None else None,
                keep=None if declared is None else declared.to_keep(),
            )
        except (InfeasibleError, ValueError) as error:
            raise dg.Failure(f"the choice cannot be made: {error}", allow_retries=False) from error

    def chosen(self, choice: "Choice") -> pl.DataFrame:
        """The chosen rows in order of preference, a frame of `SELECTED_SUBSET`."""
        rows = self.rows[choice.rows]
        recorded = {
            name: pl.Series(choice.recorded[name]).fill_nan(None)
            for name in ("gain", "inclusion_probability")
            if name in choice.recorded
        }
        return (
            rows.with_columns(
                rank=pl.int_range(1, rows.height + 1, dtype=pl.Int64),
                source=pl.col(self._selection.source_label),
                why=self._why(choice),
                **{
                    name: recorded.get(name, pl.lit(None, pl.Float64))
                    for name in ("gain", "inclusion_probability")
                },
            )
            .join(self._directions(rows), on=["shard", "row"], how="left", maintain_order="left")
            .select(polars_schema(SELECTED_SUBSET).names())
            .cast(polars_schema(SELECTED_SUBSET))
        )

    def _directions(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The strongest directions of some rows, by shard and row."""
        found = []
        for (shard,), part in rows.group_by("shard", maintain_order=True):
            directions = directions_of_rows(
                self._pool.embeddings,
                self._pool.table(str(shard)),
                self._subspace,
                part["row"].sort().to_list(),
                unit_rows=self._selection.unit_rows,
            )
            found.append(directions.with_columns(shard=pl.lit(shard, pl.String)))
        return pl.concat(found)

    def compared(self, choice: "Choice") -> pl.DataFrame:
        """The choice beside other strategies' choices, a frame of `comparison.SUBSET_COMPARISON`.

        It is empty where the selection declares no comparison, or the pool has too many rows for one.
        """
        settings = self._selection.compare
        if settings is None or self.rows.height > settings.max_rows or not self._subspace.k:
            return pl.DataFrame(schema=polars_schema(comparison.SUBSET_COMPARISON))
        projections = self._projections()
        others = comparison.alternatives(
            settings,
            self._candidates,
            self._terms,
            projections,
            seed=self._selection.seed,
            stratify_by=self._selection.source_label,
        )
        return comparison.compare(
            [comparison.Compared(comparison.CHOICE, None, choice.rows), *others],
            self._pool,
            self.rows,
            self._candidates,
            self._subspace,
            projections,
            last=self._earlier,
            settings=settings,
            source_label=self._selection.source_label,
            unit_rows=self._selection.unit_rows,
        )

    def numbers(self, choice: "Choice") -> dict[str, Any]:
        """Plain numbers of the choice, for the UI."""
        kept = choice.kept
        return {
            "strategy": self._selection.strategy,
            "included": choice.n_held,
            "removed": self._n_removed,
            "spent": choice.spent,
            "image_tokens": int(self._candidates.n_image_tokens[choice.rows].sum()),
            "text_tokens": int(self._candidates.n_text_tokens[choice.rows].sum()),
            **{f"strategy_{name}": float(value) for name, value in choice.figures.items()},
            **(
                {}
                if kept is None
                else {
                    "kept_earlier": kept.n_kept,
                    "churn_without_keeping": kept.churn_without,
                    "leverage_lost_by_keeping": kept.leverage_lost,
                }
            ),
        }

    def _why(self, choice: "Choice") -> pl.Series:
        held = self._terms.held[choice.rows]
        why = np.where(held, "included", "chosen").astype(object)
        if choice.kept is not None:
            why[np.isin(choice.rows, choice.kept.rows) & ~held] = "kept"
        return pl.Series(why.tolist(), dtype=pl.String)

    def _listed(self, entries: tuple[str, ...]) -> Listed:
        return find_listed(self.rows, entries) if entries else Listed(np.empty(0, np.int64), ())

    def _places(self, samples: pl.DataFrame) -> NDArray[np.int64]:
        """The rows of some samples that are there, ascending."""
        places = self.rows.with_row_index("place").join(samples, on=["sample_key", "shard"], how="semi")
        return places["place"].cast(pl.Int64).sort().to_numpy()

    def _projections(self) -> Projections:
        if self._opened is None:
            projections = Projections(
                self._pool, self.rows, self._subspace, unit_rows=self._selection.unit_rows
            )
            self._opened = self._stack.enter_context(projections)
        return self._opened


def comparison_metadata(compared: pl.DataFrame) -> dict[str, Any]:
    """The comparison with other strategies as a table for the UI."""
    if compared.is_empty():
        return {}
    rows = [
        dg.TableRecord(
            {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
        )
        for row in comparison.means(compared).iter_rows(named=True)
    ]
    columns = [dg.TableColumn("seeds", "Int64"), *column_schema(comparison.SUBSET_COMPARISON).columns]
    names = set(rows[0].data)
    return {
        **{f"choice_{name}": value for name, value in comparison.choice_numbers(compared).items()},
        "comparison": dg.MetadataValue.table(
            rows, schema=dg.TableSchema([column for column in columns if column.name in names])
        ),
    }
