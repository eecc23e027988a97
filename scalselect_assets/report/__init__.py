"""The selection report as a page: what it says (`content`), how it looks (`render`, `charts`).

Pure: contents in, text out. No Dagster, no store, no clock, no network, neither when the page is made nor
when it is read. `scalselect_assets.report.selection_report` gathers the contents.
"""
