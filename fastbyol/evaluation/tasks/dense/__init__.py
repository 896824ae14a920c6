"""Shared parts of segmentation, detection and depth: files and layouts, batches, trials, comparison, pictures."""
