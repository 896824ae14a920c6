"""A run's life: its plan, folder, log, checkpoints, state and command line."""
