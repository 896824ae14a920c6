"""From a listing of images to a .beton or to tar shards: what `data_prep/to_ffcv.py` and `to_dali.py` do."""
