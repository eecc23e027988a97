"""The operations that keep a selection up to date: staleness, the refresh, automation, cleaning."""
