"""What `scalselect demo` runs on: a pool of drawn scenes and a small VLM, both generated here."""
