"""Runs the benchmarks' loader case on a few images with its slow rows: FFCV's own Loader compiles its pipeline for 20 to 40 s.

python -m tests.long.stock_ffcv_row        (a minute)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.cases import loader

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        result = loader.run(loader.Size(images=10, batch=5, rounds=1, size_px=16, scale=0.1), scratch=Path(folder))
    row = result.row(loader.STOCK_FFCV)
    assert row.role == "rival"
    assert row.ms["wall"].median > 0
    assert loader.STOCK_FFCV not in result.skipped
    print(f"{row.name}: {row.ms['wall'].median:.2f} ms an image")
