"""What fastbyol costs, each figure beside a reference and a ceiling measured in the same run: `python -m benchmarks.run`."""
