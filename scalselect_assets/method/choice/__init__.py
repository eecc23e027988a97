"""The choice: budgets, terms and strategies."""
