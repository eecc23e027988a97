"""What a person declares of one selection."""
