"""Where images come from: one source for each backend, all with the same interface."""
