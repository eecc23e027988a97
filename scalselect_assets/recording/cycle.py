"""The cost of one cycle: all that was computed from one selected subset to the next.

A night's refresh is one cycle. So is any other work that led to a new subset, through the UI or automation
conditions, in any number of runs: a cycle is counted from what Dagster recorded since the last subset. Costs:
one query per asset, and reading the records of this cycle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from scalselect_assets.recording.records import Records


@dataclass(frozen=True, slots=True)
class Cycle:
    """The work between two selected subsets.

    Attributes:
        shards_embedded: Shards of the pool whose vectors were materialized.
        shards_reused: Shards of the pool whose vectors were not materialized.
        samples_embedded: Vectors of the pool that the model computed.
        samples_reused: Vectors of the pool that were there before.
        seconds: Time spent in each asset's body, summed over all its materializations.
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


def since_last(
    instance: dg.DagsterInstance,
    subset: dg.AssetKey,
    embeddings: dg.AssetKey,
    others: Sequence[dg.AssetKey],
    rows: Mapping[str, int],
) -> Cycle:
    """The cycle that a new subset ends.

    Args:
        instance: The instance where materializations are recorded.
        subset: Key of the selected subset, whose last materialization began the cycle.
        embeddings: Key of the embeddings, whose metadata state the number of computed rows.
        others: Keys of further assets whose seconds count.
        rows: Number of embedded rows by shard of the pool.
    """
    records = Records(instance)
    begin = records.latest_storage_id(subset)
    seconds = {}
    computed: dict[str, int] = {}
    for key in (embeddings, *others):
        spent = 0.0
        for made in records.materializations_since(key, begin):
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


def _number(materialization: dg.AssetMaterialization, name: str) -> float | int:
    """A number in a materialization's metadata; 0 if no number has this name."""
    value = materialization.metadata.get(name)
    return (
        value.value if isinstance(value, dg.IntMetadataValue | dg.FloatMetadataValue) and value.value else 0
    )
