"""A training team's code location: fine-tune the target VLM on what a selection chose.

An example to copy. It stands beside the first location (`definitions.py`) and shares no process with it: it
depends on the selection's assets by key, and reads what these leave for others, which is the manifest, the
training file, the subset's Parquet file and the images that the rows name.

=============  =====================================================================================
module         what it does
=============  =====================================================================================
`definitions`  the code location: one `training_run` for every declared selection
`asset`        the asset, its checks, and when it is due
`recipe`       what can be set for a run, and which of it makes another result
`exports`      the outputs of a selection, verified before they are used
`examples`     from a row to the model's input; only answers carry loss
`fine_tuning`  the model, LoRA, the Trainer, checkpoints, and going on from the last one
`plots`        the loss curve
=============  =====================================================================================

Only `examples` and `fine_tuning` import torch and Transformers, when an asset is materialized.
"""
