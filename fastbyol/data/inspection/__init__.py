"""Looks at data afterwards and changes nothing: what `data_prep/verify.py` and `info.py` do."""
