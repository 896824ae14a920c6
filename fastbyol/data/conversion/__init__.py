"""Converts a listing of images to a .beton or to tar shards, for `python -m fastbyol convert`."""
