"""Updates: LARS for the online network, the moving average for the target."""
