"""The start of fine-tuning: the inputs of the head, linear probes on them, and heads that start as a probe."""
