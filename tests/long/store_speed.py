"""Measures images/s of the loader from local disk and from a web server on loopback that answers after 0, 5 and 50 ms, in one run.

python -m tests.long.store_speed [--images 800] [--rounds 3]        (2 minutes on two quiet cores)

Each round reads one epoch in the order of the local traversal, with an empty cache that holds half of the data. The wait stands for the way to
a store; loopback has the bandwidth of memory, so a network's limit does not show here. A block of 8 MiB is one request.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from fastbyol.config.schema import DataConfig
from fastbyol.config.views import ViewPair
from fastbyol.data import build_loader
from fastbyol.data.conversion.tar_writer import write_tar_shards
from tests.web_server import WebServer

BATCH = 32


def images_per_s(data: str, cache: Path, *, gib: float) -> float:
    """Returns images/s over one epoch, from the first batch asked for to the last one there."""
    config = DataConfig(train=data, workers=1, prefetch=2, cache=str(cache), cache_gib=gib)
    with build_loader(config, views=ViewPair(size_px=128), seed=0, global_batch=BATCH, traversal="local", window_mib=8) as loader:
        began = time.perf_counter()
        return sum(len(batch.index) for batch in loader) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastbyol-speed-") as scratch:
        root = Path(scratch)
        rng = np.random.default_rng(0)
        (root / "images/only").mkdir(parents=True)
        for i in range(options.images):
            pixels = rng.integers(0, 256, (200, 280, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"images/only/{i:05d}.jpg", quality=95)
        write_tar_shards(root / "images", out=root / "train", workers=1, shard_mib=32)
        gib = sum(path.stat().st_size for path in (root / "train").glob("*.tar")) / 2**31
        found: dict[str, list[float]] = {}
        for number in range(options.rounds):
            found.setdefault("local disk", []).append(images_per_s(str(root / "train"), root / "unused", gib=gib))
            for wait_ms in (0, 5, 50):
                with WebServer(root, delay_s=wait_ms / 1000) as server:
                    cache = root / f"cache-{number}-{wait_ms}"
                    found.setdefault(f"store, {wait_ms} ms", []).append(images_per_s(f"{server.url}/train", cache, gib=gib))
                    assert server.sent, "nothing came from the store"
        for name, speeds in found.items():
            print(
                f"{name}: {statistics.median(speeds):.0f} images/s (median of {len(speeds)}: {', '.join(f'{s:.0f}' for s in sorted(speeds))})"
            )


if __name__ == "__main__":
    main()
