"""The method of ScalSelect (arXiv 2602.11636), without Dagster, storage or network.

Representation (numpy, torch, transformers, Pillow): `conversation` → `chat` (finds the answers) →
`preparation` (with `images`, by `workers`) → `first_layer` (with `attention`) → one vector per sample, or a
`rejection`.
`encoder` decides which samples are computed together; `loading` makes the encoder (with `families`,
`processors`, `model_card`).

Scores (numpy, scipy, threadpoolctl; torch on a GPU): `preprocessing` → `moments`, kept by shard and as
`running` totals → `subspace` of the `rank` that a rule chooses → `leverage` → `selection` of the `top_n`.
Further measures: `drift` of a basis, `sensitivity` to its rank, the `directions` that a row's leverage comes
from, and the `attention_map` of a sample over its images (by `token_layout`).

Choices (same libraries): `candidates` are ranked by one of the `strategies` (one is `spanning`); under the
terms of a budget and `quotas` the ranking gives a `choice`; `subset_measures` measures its quality.

`interrupts` defers signals during work that must not stop half-way (standard library only).
"""

REPRESENTATION_VERSION = "2"
"""Part of every model fingerprint, increased whenever the same weights would give other representations."""
