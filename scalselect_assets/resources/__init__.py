"""Access to everything outside the assets: the sample pool, the target VLM, the embedding store, files.

Resources may use `scalselect_assets.method` and know nothing of the assets.
"""
