"""The ranks that other rules would choose, and how far the choice of samples would differ."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg
import numpy as np
from numpy.typing import NDArray

from scalselect_assets.declaration.selection import Selection
from scalselect_assets.embedding import receipts
from scalselect_assets.method.choice.budget import budget_size
from scalselect_assets.recording.columns import RANK_ALTERNATIVES, column_schema
from scalselect_assets.resources.embedding_store import EmbeddingTable
from scalselect_assets.resources.storage import StorageResource

if TYPE_CHECKING:
    from scalselect_assets.method.subspace.basis import PrincipalAxes


# Comparing ranks reads at most this many vectors, of at most so many shards, and projects them on at most so
# many directions: some seconds at d = 4096.
_SAMPLE_ROWS = 8192
_SAMPLE_SHARDS = 64
_COMPARED_RANK = 1024


def rank_alternatives(
    storage: StorageResource, selection: Selection, axes: "PrincipalAxes", k: int, shards: list[str]
) -> dg.TableMetadataValue:
    """The choices that neighbouring thresholds and the other rules would make, on a sample of the pool."""
    from scalselect_assets.method.subspace.rank import EffectiveRank, EnergyThreshold, GavishDonoho, RankRule
    from scalselect_assets.method.subspace.sensitivity import rank_alternatives

    threshold = selection.energy
    neighbours = [threshold - 0.1, threshold - 0.05, threshold, (1 + threshold) / 2]
    rules: list[RankRule] = [EnergyThreshold(round(share, 6)) for share in neighbours if share > 0]
    rules.append(EffectiveRank())
    if 2 * axes.rank > min(axes.n - 1, axes.d):  # else the rule has no noise to measure
        rules.append(GavishDonoho())
    ranks = {rule_in_words(selection.rank_rule.describe()): k}
    for rule in rules:
        ranks.setdefault(rule_in_words(rule.describe()), rule.rank(axes.spectrum, axes.n, axes.d))
    compared = {rule: rank for rule, rank in ranks.items() if rank <= max(k, _COMPARED_RANK)}
    x = _sample(storage, selection, shards)
    size = budget_size(selection.expected_share(axes.n), len(x))
    alternatives = rank_alternatives(x, axes.subspace(max(compared.values())), k, compared, size)
    curve = axes.energy_curve()
    overlaps = {one.rule: round(one.overlap, 4) for one in alternatives}
    rows: list[dict[str, Any]] = [
        {
            "rule": rule,
            "k": rank,
            "energy": round(float(curve[rank - 1]), 4) if rank else 0.0,
            "overlap": overlaps.get(rule),
            "chosen_samples": size,
            "compared_samples": len(x),
        }
        for rule, rank in ranks.items()
    ]
    return dg.MetadataValue.table(
        [dg.TableRecord(row) for row in rows], schema=column_schema(RANK_ALTERNATIVES)
    )


def _sample(storage: StorageResource, selection: Selection, shards: list[str]) -> NDArray[Any]:
    """Vectors of the pool, (m, d): all of a small pool, else a limited number; the same at every call."""
    from scalselect_assets.method.subspace.preprocessing import prepared_rows

    generator = np.random.default_rng(0)
    artifacts, embeddings = storage.artifacts(selection.store), storage.embeddings(selection.store)
    tables: list[EmbeddingTable] = []
    for shard in generator.permutation(np.array(shards, dtype=object)):
        table, _ = receipts.recorded_table(artifacts, shard)
        if table.n_rows:
            tables.append(table)
        if len(tables) == _SAMPLE_SHARDS:
            break
    share = min(1.0, _SAMPLE_ROWS / sum(table.n_rows for table in tables))
    vectors = [
        embeddings.take(
            table,
            np.sort(
                generator.choice(table.n_rows, max(1, int(share * table.n_rows)), replace=False)
            ).tolist(),
        )
        for table in tables
    ]
    return prepared_rows(np.concatenate(vectors), to_unit_length=selection.unit_rows)


def rule_in_words(rule: Mapping[str, Any]) -> str:
    """A rank rule in words."""
    name, *rest = rule.values()
    return " ".join([str(name), *(f"{value:g}" for value in rest)])
