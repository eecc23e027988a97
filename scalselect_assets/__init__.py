"""ScalSelect as a Dagster data product: the path from a pool of samples to a training dataset.

====  ======================  ==========  ===============================================  ===============
step  asset (module)          partition   what it holds                                    kept as
====  ======================  ==========  ===============================================  ===============
1     `raw_samples`           shard       every row, read and judged                       Parquet
2     `attention_embeddings`  shard       one vector per sample, from the target VLM       LanceDB
3     `embedding_moments`     shard       n, mean and scatter matrix of the vectors        safetensors
4     `subspace_basis`        all shards  directions that hold the energy threshold        safetensors
5     `importance_scores`     shard       leverage score of each sample                    Parquet
6     `selected_subset`       all shards  the N samples with the highest leverage          Parquet
7     `training_dataset`      all shards  their rows as a trainer reads them, a manifest   JSON
====  ======================  ==========  ===============================================  ===============

`selection` declares one such path (a pool and a target model) and `graph` builds it; `refresh` discovers
shards and materializes exactly what is stale; `method` is the paper, without Dagster or storage.

This package itself imports nothing, so that `scalselect_assets.method` runs where Dagster is not installed.
"""

ASSET_MODULES = (
    "raw_samples",
    "attention_embeddings",
    "embedding_moments",
    "subspace_basis",
    "importance_scores",
    "selected_subset",
    "training_dataset",
)
"""The asset modules in path order; each bears the name of its asset."""
