"""Partitions by shard, and what an unpartitioned asset reads of them.

A shard is one file of the pool, and its partition key is its path below the pool, escaped where Dagster
forbids a character. Shards come and go, so the partitions are dynamic; `refresh` adds and deletes them.
"""

from collections.abc import Sequence

import dagster as dg

from scalselect_assets.method.interrupts import deferred


def shards_name(selection_name: str) -> str:
    """What Dagster calls the shards of one selection."""
    return f"{selection_name}_shards"


def shard_partitions(selection_name: str) -> dg.DynamicPartitionsDefinition:
    """The shards of one selection."""
    return dg.DynamicPartitionsDefinition(name=shards_name(selection_name))


@deferred()
def known_shards(instance: dg.DagsterInstance, selection_name: str) -> Sequence[str]:
    """The shards of one selection that Dagster knows, in its order."""
    return instance.get_dynamic_partitions(shards_name(selection_name))


@deferred()
def pool_shards(context: dg.AssetExecutionContext, partitions: dg.DynamicPartitionsDefinition) -> list[str]:
    """All shards of the pool, sorted."""
    return sorted(partitions.get_partition_keys(dynamic_partitions_store=context.instance))


def missing_shards_check(name: str, missing: Sequence[str]) -> dg.AssetCheckResult:
    """Warns where shards of the pool are not part of a result, and names them.

    A shard whose file cannot be read must not stop the others, and it must not vanish.
    """
    return dg.AssetCheckResult(
        check_name=name,
        passed=not missing,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"missing_shards": list(missing[:100]), "n_missing_shards": len(missing)},
    )


def shard_check(
    partitions: dg.PartitionsDefinition[str], asset: dg.AssetKey, name: str, description: str
) -> dg.AssetCheckSpec:
    """A check whose result Dagster keeps for each shard."""
    return dg.AssetCheckSpec(name, asset=asset, description=description, partitions_def=partitions)
