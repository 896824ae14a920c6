"""Sub-commands of `python -m fastbyol`, one a file: its arguments, and one call into the rooms below."""
