"""The selected rows as trainers read them, one module a format; `publish` writes them, `spec` declares them.

Part of `training_dataset`. What a format refuses is told with a typed reason; nothing is dropped silently.
This package imports nothing by itself.
"""
