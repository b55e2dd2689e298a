"""Tables of labelled text."""
