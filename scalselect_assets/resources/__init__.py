"""The assets' means to the outside: the sample pool, the target VLM, the embedding store, files.

Resources may use `scalselect_assets.method` and know nothing of the assets.
"""
