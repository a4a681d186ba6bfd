"""Decoders that write an answer into a canvas, one per file."""
