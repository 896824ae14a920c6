"""Sub-commands of `python -m fastbyol`, one per file: each defines its arguments and makes one call into the layers below."""
