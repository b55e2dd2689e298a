"""Base classes and functions of several methods."""
