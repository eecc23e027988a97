"""Steps 5a and 6: which samples are removed, and which are chosen."""
