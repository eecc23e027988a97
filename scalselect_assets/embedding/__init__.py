"""Step 2: one vector per sample."""
