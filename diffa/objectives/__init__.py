"""Objectives: how answers are corrupted for training and what restoring them costs."""
