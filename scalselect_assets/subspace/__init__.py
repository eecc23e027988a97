"""Steps 3 to 5: moments, basis and scores."""
