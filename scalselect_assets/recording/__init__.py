"""What Dagster records of an asset: versions, columns, partitions, materializations."""
