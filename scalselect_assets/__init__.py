"""ScalSelect as a Dagster data product: the path from a pool of samples to a training dataset.

====  ======================  ==========  ===============================================  ===============
step  asset (module)          partition   what it holds                                    kept as
====  ======================  ==========  ===============================================  ===============
1     `raw_samples`           shard       every row, read and judged                       Parquet
2     `attention_embeddings`  shard       one vector per sample, from the target VLM       LanceDB
3     `embedding_moments`     shard       n, mean and scatter matrix of the vectors        safetensors
4     `subspace_basis`        all shards  directions that hold the energy threshold        safetensors
5     `importance_scores`     shard       leverage score of each sample                    Parquet
5a    `removed_samples`       all shards  duplicates and what evaluation sets hold         Parquet
6     `selected_subset`       all shards  the samples chosen within the budget             Parquet
7     `training_dataset`      all shards  their rows as trainers read them, a manifest     JSON, ...
8     `selection_report`      all shards  the result on one page, for people               HTML
====  ======================  ==========  ===============================================  ===============

A selection has step 5a if it declares samples to remove, and step 8 if it declares a report.

`declaration` holds the settings of one such path (a pool and a target model) and `graph` builds it;
`operations` discovers shards and materializes exactly the stale assets; `method` is the paper, without
Dagster or storage.

This package itself imports nothing, so that `scalselect_assets.method` runs where Dagster is not installed.
"""

ASSET_MODULES = {
    "raw_samples": "scalselect_assets.pool.raw_samples",
    "attention_embeddings": "scalselect_assets.embedding.attention_embeddings",
    "embedding_moments": "scalselect_assets.subspace.embedding_moments",
    "subspace_basis": "scalselect_assets.subspace.subspace_basis",
    "importance_scores": "scalselect_assets.subspace.importance_scores",
    "removed_samples": "scalselect_assets.choice.removed_samples",
    "selected_subset": "scalselect_assets.choice.selected_subset",
    "training_dataset": "scalselect_assets.dataset.training_dataset",
    "selection_report": "scalselect_assets.report.selection_report",
}
"""The asset modules by asset, in path order. A new asset is one more line here and its module."""
