"""Steps 0 and 1: which shards there are, and their rows."""
