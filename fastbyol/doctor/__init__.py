"""Says what of this installation and machine works, for `python -m fastbyol doctor`: packages, machine, disk, self tests."""
