"""Converts a listing of images to a .beton or to tar shards, for `data_prep/to_ffcv.py` and `to_dali.py`."""
