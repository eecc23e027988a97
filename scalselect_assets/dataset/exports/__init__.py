"""The selected rows as trainers read them, one module a format; `publish` writes them, `spec` declares them.

Part of `training_dataset`. A row that a format refuses is listed with a
typed reason; nothing is dropped silently.
This package imports nothing by itself.
"""
