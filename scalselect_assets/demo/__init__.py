"""The input of `scalselect demo`: a pool of drawn scenes and a small VLM, both generated here."""
