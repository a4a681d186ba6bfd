"""Fails while it is imported."""

raise RuntimeError("the stars are wrong")
