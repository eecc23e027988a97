"""The settings that a person declares for one selection."""
