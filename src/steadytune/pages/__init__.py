"""Self-contained pages: their contents and their plots. No torch here."""
