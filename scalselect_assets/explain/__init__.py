"""Why one sample was chosen or not, and everything that it came from."""
