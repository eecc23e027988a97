"""Dagster's records of an asset: versions, columns, partitions, materializations, and the access to them."""
