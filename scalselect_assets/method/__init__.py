"""The method of ScalSelect (arXiv 2602.11636), without Dagster, storage or network.

Representation (numpy, torch, transformers, Pillow): `conversation` → `chat` (whose text is it?) →
`preparation` (with `images`, by `workers`) → `first_layer` (with `attention`) → one vector per sample, or a
`rejection`.
`encoder` decides what is computed together; `loading` makes it (with `families`, `processors`, `model_card`).

Scores (numpy, scipy, threadpoolctl; torch on a GPU): `preprocessing` → `moments`, kept by shard and as
`running` totals → `subspace` of the `rank` that a rule chooses → `leverage` → `selection` of the `top_n`.
Beside the path: `drift` of a basis, `sensitivity` to its rank, the `directions` that a row's leverage comes
from, and the `attention_map` of a sample over its images (by `token_layout`).

Choices (the same): `candidates` are ranked by one of the `strategies` (one is `spanning`); under the terms
of a budget and `quotas` the ranking gives a `choice`; `subset_measures` says what it is worth.

`interrupts` wait for what must not stop half-way (the standard library's alone).
"""

REPRESENTATION_VERSION = "2"
"""Part of every model fingerprint; raised whenever the same weights would give other representations."""
