"""Language models that read embeddings, one per file."""
