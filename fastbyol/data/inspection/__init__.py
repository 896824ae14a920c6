"""Read-only checks and statistics of data sets, for `data_prep/verify.py` and `info.py`."""
