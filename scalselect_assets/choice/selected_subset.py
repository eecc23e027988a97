"""Step 6, all shards: the budgeted choice.

Holds: the chosen samples in order of preference, and beside them (`subset_comparison`) what other strategies
choose on the same terms, measured alike. By default the N samples of highest leverage over the whole pool,
ties by `sample_key`, then shard. Refuses scores of other bases than the basis says, and terms that cannot be
met, with the numbers. Costs: the scores once, some 300 bytes of memory for every row of the pool, and what
the comparison costs (`comparison`).
"""

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dagster as dg
import numpy as np
import polars as pl
from numpy.typing import NDArray

from resources.artifacts import ArtifactCorruptError, ArtifactMissingError, ArtifactStore
from resources.identity import digest
from resources.storage import StorageResource
from scalselect_assets import (
    attention_embeddings,
    comparison,
    cycle,
    embedding_moments,
    importance_scores,
    lineage,
    raw_samples,
    removed_samples,
    subspace_basis,
)
from scalselect_assets.materialization import Output, at_work
from scalselect_assets.partitions import missing_shards_check, pool_shards
from scalselect_assets.pool_rows import Listed, PoolRows, Projections, candidates, find_listed, read_list
from scalselect_assets.sample_directions import directions_of_rows
from scalselect_assets.selection import Selection
from scalselect_assets.tables import SELECTED_SUBSET, column_schema, polars_schema

if TYPE_CHECKING:
    from scalselect_assets.method.choice import Choice
    from scalselect_assets.method.subspace import Subspace

NAME = "selected_subset"
CODE_VERSION = "3"
_SUM_TOLERANCE = 1e-5  # relative; the scores are within this of float64, and their errors do not add up


def provenance(selection: Selection, basis_version: str, lists_version: str, removed_version: str) -> str:
    """What the choice is computed from.

    Args:
        selection: What is asked for.
        basis_version: The version of the basis, which covers the scores of every shard in it.
        lists_version: `Lists.version`.
        removed_version: Of the removed samples; empty where none are removed.
    """
    return lineage.provenance(
        NAME,
        CODE_VERSION,
        choice=selection.choice_settings(),
        importance_scores=importance_scores.pool_version(basis_version),
        lists=lists_version,
        removed_samples=removed_version,
    )


@dataclass(frozen=True, slots=True)
class Lists:
    """The samples that must, and that must not, be chosen."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]

    @classmethod
    def read(cls, selection: Selection, storage: StorageResource) -> "Lists":
        """The declared lists.

        Raises:
            SampleListError: One cannot be read.
        """
        include, exclude = (
            () if place is None else tuple(read_list(storage.path(place)))
            for place in (selection.include, selection.exclude)
        )
        return cls(include, exclude)

    @property
    def version(self) -> str:
        """Of their entries."""
        return digest(self.include, self.exclude)


def build(selection: Selection) -> dg.AssetsDefinition:
    """The asset for one selection."""

    @dg.asset(
        **selection.asset_options(NAME, by_shard=False),
        deps=[
            selection.key(name)
            for name in (
                importance_scores.NAME,
                subspace_basis.NAME,
                attention_embeddings.NAME,
                *([removed_samples.NAME] if selection.removes_samples else []),
            )
        ],
        kinds={"polars", "parquet"},
        code_version=lineage.shown_code_version(CODE_VERSION, choice=selection.choice_settings()),
        metadata={"dagster/column_schema": column_schema(SELECTED_SUBSET)},
        check_specs=[
            dg.AssetCheckSpec(
                "leverage_scores_sum_to_rank",
                asset=selection.key(NAME),
                description="The scores of all shards sum to k, as leverage scores do.",
            ),
            dg.AssetCheckSpec(
                "selection_covers_every_shard",
                asset=selection.key(NAME),
                description="Every shard of the pool is scored and could be selected from.",
            ),
            dg.AssetCheckSpec(
                "listed_samples_are_in_the_pool",
                asset=selection.key(NAME),
                description="Every entry of the lists to include and to exclude names an embedded row.",
            ),
        ],
    )
    def selected_subset(context: dg.AssetExecutionContext, storage: StorageResource) -> dg.MaterializeResult:
        """The samples that the strategy prefers within the budget and its terms, over all shards."""
        with at_work(context, storage.locks(selection.store)), ExitStack() as stack:
            start = time.monotonic()
            artifacts = storage.artifacts(selection.store)
            subspace, basis = subspace_basis.read_basis(artifacts)
            in_basis = json.loads(basis["shards"])
            pool = pool_shards(context, selection.partitions)
            before = _last_selected(artifacts)
            lists = Lists.read(selection, storage)
            removed, removed_version = removed_samples.read_removed(artifacts, selection)
            chooser = _Chooser(
                selection,
                PoolRows(
                    artifacts,
                    storage.embeddings(selection.store),
                    basis["data_version"],
                    in_basis,
                    selection.labels,
                    with_images=bool(lists.include or lists.exclude),
                ),
                subspace,
                lists,
                removed,
                before,
                stack,
            )
            chosen, compared = chooser.chosen(), chooser.compared()
            data_version = _content_version(chosen)
            made_from = provenance(selection, basis["data_version"], lists.version, removed_version)
            header = lineage.header(data_version, made_from, subspace_basis=basis["data_version"])
            artifacts.write_frame(comparison.NAME, compared, header)
            path, n_bytes = artifacts.write_frame(NAME, chosen, header)
            scores = chooser.rows
            normalised_sum, leverage_sum = (
                float(scores[name].to_numpy().sum()) for name in ("normalised_leverage", "leverage")
            )
            return Output(
                data_version,
                made_from,
                {
                    "dagster/row_count": chosen.height,
                    "embedded": scores.height,
                    **_churn(before, chosen),
                    **chooser.told(),
                    "rank": subspace.k,
                    "leverage_sum": leverage_sum,
                    "repeated_across_shards": chosen.height - chosen["sample_key"].n_unique(),
                    "leverage_threshold": float(chosen["leverage"].to_numpy().min()),
                    "normalised_leverage_threshold": float(chosen["normalised_leverage"].to_numpy().min()),
                    "basis_version": basis["data_version"],
                    **{f"drift_{name}": value for name, value in json.loads(basis["drift"]).items()},
                    **_comparison_metadata(compared),
                    **_cycle(context, selection, in_basis).metadata(),
                    "seconds": time.monotonic() - start,
                    "bytes": n_bytes,
                    "dagster/uri": str(path),
                },
                (
                    dg.AssetCheckResult(
                        check_name="leverage_scores_sum_to_rank",
                        passed=scores.height == subspace.n
                        and (
                            abs(normalised_sum - subspace.n) <= _SUM_TOLERANCE * subspace.n
                            if subspace.k
                            else normalised_sum <= _SUM_TOLERANCE * subspace.n
                        ),
                        metadata={
                            "leverage_sum": leverage_sum,
                            "normalised_mean": normalised_sum / scores.height,
                            "rank": subspace.k,
                            "scored": scores.height,
                            "samples_in_basis": subspace.n,
                            "tolerance": _SUM_TOLERANCE,
                        },
                    ),
                    missing_shards_check(
                        "selection_covers_every_shard", [shard for shard in pool if shard not in in_basis]
                    ),
                    _listed_check(chooser.unknown),
                ),
            ).result()

    return selected_subset


class _Chooser:
    """Chooses once, and knows what the choice was made from.

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
        from scalselect_assets.method.choice import choose
        from scalselect_assets.method.quotas import InfeasibleError, agree
        from scalselect_assets.method.strategies import strategy_named

        self._selection, self._pool, self._subspace, self._stack = selection, pool, subspace, stack
        self.rows = pool.all()
        self._candidates = candidates(self.rows, selection.labels)
        include, exclude = self._listed(lists.include), self._listed(lists.exclude)
        self.unknown = include.unknown + exclude.unknown
        self._n_removed = removed.height
        self._earlier = None if before is None else self._places(before)
        strategy = strategy_named(selection.strategy, seed=selection.seed, stratify_by=selection.source_label)
        declared = None if self._earlier is None else selection.keep_earlier
        keep = None if declared is None else declared.to_keep()
        self._opened: Projections | None = None
        try:
            self._terms = agree(
                self._candidates,
                selection.declared_budget,
                [quota.to_quota(selection.source_label) for quota in selection.quotas],
                include=include.rows,
                exclude=np.union1d(exclude.rows, self._places(removed)),
            )
            self._choice: Choice = choose(
                self._candidates,
                strategy,
                self._terms,
                self._projections().blocks if strategy.needs_projections else None,
                earlier=self._earlier if keep is not None else None,
                keep=keep,
            )
        except (InfeasibleError, ValueError) as error:
            raise dg.Failure(f"the choice cannot be made: {error}", allow_retries=False) from error

    def chosen(self) -> pl.DataFrame:
        """A frame of `SELECTED_SUBSET`."""
        choice = self._choice
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
                why=self._why(),
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

    def compared(self) -> pl.DataFrame:
        """A frame of `comparison.SUBSET_COMPARISON`; empty where nothing is to be compared."""
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
            [comparison.Compared(comparison.CHOICE, None, self._choice.rows), *others],
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

    def told(self) -> dict[str, Any]:
        """Plain numbers of the choice, for the UI."""
        choice = self._choice
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

    def _why(self) -> pl.Series:
        choice = self._choice
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


def _listed_check(unknown: tuple[str, ...]) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name="listed_samples_are_in_the_pool",
        passed=not unknown,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"n_unknown": len(unknown), "unknown": list(unknown[:100])},
    )


def _comparison_metadata(compared: pl.DataFrame) -> dict[str, Any]:
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
        **{f"choice_{name}": value for name, value in comparison.told(compared).items()},
        "comparison": dg.MetadataValue.table(
            rows, schema=dg.TableSchema([column for column in columns if column.name in names])
        ),
    }


def _cycle(
    context: dg.AssetExecutionContext, selection: Selection, in_basis: Mapping[str, Mapping[str, str]]
) -> cycle.Cycle:
    """What this subset cost, from the last one on."""
    return cycle.since_last(
        context.instance,
        selection.key(NAME),
        selection.key(attention_embeddings.NAME),
        [
            selection.key(module.NAME)
            for module in (raw_samples, embedding_moments, subspace_basis, importance_scores)
        ],
        {shard: int(moments["rows"]) for shard, moments in in_basis.items()},
    )


def _last_selected(artifacts: ArtifactStore) -> pl.DataFrame | None:
    """The samples that were selected last; none at first, and none from a damaged file."""
    try:
        return artifacts.read_frame(NAME, columns=["sample_key", "shard"])[0]
    except (ArtifactMissingError, ArtifactCorruptError):
        return None


def _churn(before: pl.DataFrame | None, chosen: pl.DataFrame) -> dict[str, int | float]:
    """What became of the last selection: how many samples stayed, came and went, and the share that went."""
    if before is None:
        return {}
    stayed = before.join(chosen, on=["sample_key", "shard"], how="semi").height
    return {
        "stayed": stayed,
        "came": chosen.height - stayed,
        "went": before.height - stayed,
        "churn": (before.height - stayed) / max(before.height, 1),
    }


def _content_version(chosen: pl.DataFrame) -> str:
    chosen = chosen.drop("strongest_directions")  # which follow from the rest, up to rounding
    content = hashlib.sha256()
    for part in chosen.iter_slices(100_000):  # as text, a row takes some hundred bytes
        content.update(part.write_ndjson().encode())
    return digest(content.hexdigest())
