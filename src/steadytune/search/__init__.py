"""Search: which recipe to use for a table, and how sure that is."""
