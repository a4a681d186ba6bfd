"""Adapters from encoder states to backbone embeddings, one per file."""
