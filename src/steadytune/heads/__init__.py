"""The start of a fine-tuning: what the head reads, a linear probe on it, and heads that begin as that probe."""
