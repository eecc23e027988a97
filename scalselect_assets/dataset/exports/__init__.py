"""The exports of the selected rows in trainers' formats, one module per format; `publish` writes them.

They are part of `training_dataset`. A row that a format refuses is listed with a typed reason; no row is
dropped silently. This package imports nothing by itself.
"""
