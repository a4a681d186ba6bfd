"""Training objectives: how answers are corrupted, and the loss of restoring them."""
