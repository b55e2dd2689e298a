"""Pages that need nothing else: what they are made of, and how their plots are drawn. No torch here."""
