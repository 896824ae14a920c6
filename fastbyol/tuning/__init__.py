"""Measures which settings run fastest on this machine, to start a run from."""
