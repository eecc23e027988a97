"""Step 7: the chosen rows as trainers read them."""
