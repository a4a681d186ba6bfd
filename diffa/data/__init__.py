"""Data: where samples come from, in which order, and how they become batches."""
