"""The method of ScalSelect (arXiv 2602.11636): numpy, torch, transformers and Pillow, nothing else.

Representation: `conversation` → `chat` (whose text is it?) → `encoder` (with `attention`, `families`,
`images`) → one vector per sample, or a `rejection`. Scores: `moments` → `subspace` → `leverage` →
`selection`.
"""

REPRESENTATION_VERSION = "1"
"""Part of every model fingerprint; raised whenever the same weights would give other representations."""
