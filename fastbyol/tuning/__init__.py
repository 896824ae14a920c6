"""What runs fastest on this machine, measured: the settings to start a run from."""
