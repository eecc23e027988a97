"""Charts and their captions, for the report and for the UI."""
