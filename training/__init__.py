"""A training team's code location: fine-tune the target VLM on what a selection chose.

It is an example to copy. It shares no process with the first location (`definitions.py`): it depends on the
selection's assets by key, and reads the files that they leave for others: the manifest, the training file,
the subset's Parquet file and the images that the rows name.

===============  ===================================================================================
module           content
===============  ===================================================================================
`definitions`    the code location: one `training_run` for every declared selection
`asset`          the asset, its checks, and the condition on which it is due
`recipe`         the settings of a run, and which of them change the result
`training_data`  the outputs of a selection, verified before they are used
`examples`       from a row to the model's input, with loss on answers only
`fine_tuning`    the model, LoRA, the Trainer, and resuming from a checkpoint
`result`         the outcome of a training, and the file that holds it
`plots`          the loss curve
===============  ===================================================================================

Only `examples` and `fine_tuning` import torch and Transformers, when an asset is materialized.
"""
