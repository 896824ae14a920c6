"""Benchmarks of fastbyol, each figure with a reference and a ceiling measured in the same run: `python -m benchmarks.run`."""
