"""Sources of images: one for each backend, all with the same interface."""
