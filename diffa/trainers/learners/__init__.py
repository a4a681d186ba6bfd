"""Learners: what a training stage optimizes."""
