"""The forms in which shards are kept: a module for each, and the registry that finds one by a file's name."""
