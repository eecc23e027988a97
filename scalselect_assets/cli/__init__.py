"""The `scalselect` command: options, what each subcommand does, and what it prints."""
