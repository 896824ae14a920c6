"""Read-only checks and statistics of data sets, for `python -m fastbyol verify` and `info`."""
