"""Measure methods against each other: what a benchmark of several seeds and tasks shows, and what it does not."""
