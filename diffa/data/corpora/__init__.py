"""Readers of published speech corpora."""
