"""What segmentation, detection and depth share: files and layouts, batches, trials, comparison, pictures."""
