"""Updates of the two networks: LARS for the online one, a moving average for the target. No data, no files, no command line."""
