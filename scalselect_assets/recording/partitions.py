"""Partitions by shard, and the checks that go with them.

A shard is one file of the pool. Its partition key is its path below the pool, with the characters escaped
that Dagster forbids. Shards come and go, so the partitions are dynamic: discovery adds and deletes them.
"""

from collections.abc import Sequence

import dagster as dg


def shards_name(selection_name: str) -> str:
    """Dagster's name for the partitions of one selection."""
    return f"{selection_name}_shards"


def shard_partitions(selection_name: str) -> dg.DynamicPartitionsDefinition:
    """The partitions definition of one selection's shards."""
    return dg.DynamicPartitionsDefinition(name=shards_name(selection_name))


def missing_shards_check(name: str, missing: Sequence[str]) -> dg.AssetCheckResult:
    """A check that warns where shards of the pool are not part of a result, and names them.

    A shard whose file cannot be read must not stop the others, and it must not vanish unseen.
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
