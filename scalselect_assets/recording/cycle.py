"""What one cycle has cost: all that was computed from one selected subset to the next.

A night's refresh is one cycle, and so is whatever else led to a new subset, through the UI or automation
conditions, in however many runs: it is counted from what Dagster recorded since the last subset. Costs: one
query per asset, and reading the records of this cycle.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from scalselect_assets.method.interrupts import deferred

_RECORDS_PER_QUERY = 1000  # Dagster's own limit


@dataclass(frozen=True, slots=True)
class Cycle:
    """The work between two selected subsets.

    Attributes:
        shards_embedded: Shards of the pool whose vectors were materialized.
        shards_reused: Shards of the pool whose vectors stand as they were.
        samples_embedded: Vectors of the pool that the model computed.
        samples_reused: Vectors of the pool that were there before.
        seconds: By asset, in its bodies, over all its materializations.
    """

    shards_embedded: int
    shards_reused: int
    samples_embedded: int
    samples_reused: int
    seconds: Mapping[str, float]

    def metadata(self) -> dict[str, Any]:
        """Plain numbers, which the UI plots over time, and the seconds by asset as a table."""
        return {
            "cycle_shards_embedded": self.shards_embedded,
            "cycle_shards_reused": self.shards_reused,
            "cycle_samples_embedded": self.samples_embedded,
            "cycle_samples_reused": self.samples_reused,
            "cycle_seconds": sum(self.seconds.values()),
            "cycle_seconds_by_asset": dg.MetadataValue.table(
                [
                    dg.TableRecord({"asset": asset, "seconds": round(seconds, 3)})
                    for asset, seconds in self.seconds.items()
                ],
                schema=dg.TableSchema(
                    [dg.TableColumn("asset", "string"), dg.TableColumn("seconds", "float")]
                ),
            ),
        }


@deferred()
def since_last(
    instance: dg.DagsterInstance,
    subset: dg.AssetKey,
    embeddings: dg.AssetKey,
    others: Sequence[dg.AssetKey],
    rows: Mapping[str, int],
) -> Cycle:
    """The cycle that a new subset ends.

    Args:
        instance: Where materializations are recorded.
        subset: Of the selected subset, whose last materialization began the cycle.
        embeddings: Of the embeddings, whose metadata tell how many rows were computed.
        others: Further assets whose seconds count.
        rows: Embedded rows of the pool's shards.
    """
    last = instance.fetch_materializations(subset, limit=1).records
    begin = last[0].storage_id if last else None
    seconds = {}
    computed: dict[str, int] = {}
    for key in (embeddings, *others):
        spent = 0.0
        for made in _materializations(instance, key, begin):
            spent += float(_number(made, "seconds"))
            shard = made.partition
            if key == embeddings and shard is not None and shard in rows:
                # A shard that was made twice took over the second time what it had computed the first time.
                made_rows = computed.get(shard, 0) + int(_number(made, "computed_rows"))
                computed[shard] = min(made_rows, rows[shard])
        seconds[key.path[-1]] = spent
    n_computed = sum(computed.values())
    return Cycle(
        shards_embedded=len(computed),
        shards_reused=len(rows) - len(computed),
        samples_embedded=n_computed,
        samples_reused=sum(rows.values()) - n_computed,
        seconds=seconds,
    )


def _materializations(
    instance: dg.DagsterInstance, key: dg.AssetKey, begin: int | None
) -> Iterator[dg.AssetMaterialization]:
    """Those after a storage id."""
    wanted = dg.AssetRecordsFilter(key, after_storage_id=begin)
    cursor = None
    while True:
        page = instance.fetch_materializations(wanted, limit=_RECORDS_PER_QUERY, cursor=cursor)
        for record in page.records:
            if record.asset_materialization is not None:
                yield record.asset_materialization
        if not page.has_more:
            return
        cursor = page.cursor


def _number(materialization: dg.AssetMaterialization, name: str) -> float | int:
    """A number of its metadata, 0 where it has none."""
    value = materialization.metadata.get(name)
    return (
        value.value if isinstance(value, dg.IntMetadataValue | dg.FloatMetadataValue) and value.value else 0
    )
