"""Measures the loader on tar shards in a store, 0, 5 and 50 ms away, beside the same shards on local disk.

How: one epoch of generated ImageNet-like files (`imagenet_like.py`), two 224 px views, one thread, in the order of the local traversal.
A real nginx serves the shards from a network namespace of its own; every round trip to it is longer by the row's delay
(`slow_link.py`; the note says by what). The cache on local disk holds half of the data and is empty before each epoch; the tables are read
before the clock starts, as once in a run. Reference: local disk, with nothing of the shards in the page cache. Ceiling: local disk, with all
of them there, as the server has them too. `fetch only` reads the same bytes from the store with as many
connections and decodes nothing: no loader can be faster. Read the wall clock. Needs root and Debian's nginx-light, iproute2 and util-linux.

    python -m benchmarks.run store

Why: blocks of 8 MiB are fetched ahead in the order in which they will be needed, so a delay shows before the first batch, and after it
only where decoding is faster than fetching. An epoch as short as this one makes the first wait look larger than it is. A store costs CPU
time too: each block is received, its checksums are computed, and it is written to the cache, before an image of it is decoded.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.imagenet_like import copy_names, write_imagenet_like
from benchmarks.record import CaseResult, measured
from benchmarks.slow_link import SlowLink, require_programs
from benchmarks.timing import Subject, torch_threads
from fastbyol.config.schema import DataConfig
from fastbyol.config.views import ViewPair
from fastbyol.data import build_loader
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.data.fetch_ahead import THREADS
from fastbyol.data.loader import TwoViewLoader
from fastbyol.host.store_path import BLOCK_BYTES, StorePath

REFERENCE, CEILING, FIRST = "local disk", "local disk, in the page cache", "ms to the first batch"


@dataclass(frozen=True)
class Size:
    """delays_ms: added to a round trip. cache_share: of the data, held by the cache. scale: of ImageNet's image sides."""

    images: int
    """Number of different images."""
    copies: int
    """Names of each: an epoch must outlast the wait for its first batch, and images take long to draw."""
    batch: int
    """A divisor of all images."""
    rounds: int
    shard_mib: int
    window_mib: int
    delays_ms: tuple[float, ...] = (0, 5, 50)
    cache_share: float = 0.5
    size_px: int = 224
    scale: float = 1.0
    seed: int = 0
    writers: int = 1
    """Processes that generate the images."""


QUICK = Size(images=50, copies=3, batch=30, rounds=6, shard_mib=1, window_mib=1, size_px=96, scale=0.5)
FULL = Size(images=160, copies=8, batch=32, rounds=6, shard_mib=32, window_mib=16, writers=2)


def run(size: Size, *, scratch: Path) -> CaseResult:
    require_programs({"nginx-light": ("nginx",)})
    with SlowLink(nginx_command(scratch)) as link:  # first, since where it cannot be there is nothing to measure
        folder = write_imagenet_like(scratch / "images", images=size.images, scale=size.scale, seed=size.seed, workers=size.writers)
        copy_names(folder, size.copies)
        write_tar_shards(folder, out=scratch / "served" / "train", workers=1, shard_mib=size.shard_mib)
        epochs = Epochs(scratch, size, link)
        subjects = [epochs.local(CEILING, cold=False), epochs.local(REFERENCE, cold=True)]
        subjects += [epochs.stored(delay_ms) for delay_ms in size.delays_ms]
        subjects += [epochs.fetched(delay_ms) for delay_ms in size.delays_ms]
        title = f"an epoch of {epochs.images:,} images, {epochs.data_bytes / 2**20:.0f} MiB of tar shards, with a cache of {size.cache_share:.0%} of it"
        with torch_threads(1):
            given = {"settings": size, "primary": "wall", "warmed_up": epochs.first_ms.clear}
            result = measured("store", title, subjects, reference=REFERENCE, ceiling=CEILING, **given)
        return result.with_extra(epochs.extra())


def nginx_command(scratch: Path) -> list[str]:
    """Returns the command of a web server of `scratch`/served that stays in one process and in the foreground."""
    config, log = scratch / "nginx.conf", scratch / "nginx.log"
    (scratch / "served").mkdir()
    config.write_text(
        f"daemon off; master_process off; pid {scratch}/nginx.pid; error_log {log}; user root; events {{ }}\n"
        f"http {{ access_log off; sendfile on; server {{ listen 80; root {scratch}/served; }} }}\n"
    )
    return ["nginx", "-c", str(config), "-e", str(log)]


class Epochs:
    """Makes the subjects: each prepares its caches and opens its loader before the clock starts, and reads one epoch."""

    def __init__(self, scratch: Path, size: Size, link: SlowLink) -> None:
        self._size, self._link, self._cache = size, link, scratch / "cache"
        self._local = scratch / "served" / "train"
        self._shards = sorted(self._local.glob("*.tar"))
        self._loader: TwoViewLoader | None = None
        self.images = size.images * size.copies
        self.data_bytes = sum(path.stat().st_size for path in self._shards)
        self.first_ms = defaultdict[str, list[float]](list)
        self._round_trip_ms: dict[str, float] = {}

    def local(self, name: str, *, cold: bool) -> Subject:
        return self._subject(name, str(self._local), (lambda: [drop_pages(path) for path in self._shards]) if cold else self._warm)

    def stored(self, delay_ms: float) -> Subject:
        name = f"store, + {delay_ms:g} ms"
        return self._subject(name, f"http://{self._link.address}/train", lambda: self._away(name, delay_ms), note=self._link.kind)

    def fetched(self, delay_ms: float) -> Subject:
        """Returns the subject that reads all blocks from the store, as many at a time as the loader does, and does nothing else."""
        place = StorePath.of(f"http://{self._link.address}/train")
        blocks = [
            (place / path.name, start, min(BLOCK_BYTES, size - start))
            for path in self._shards
            for size in [path.stat().st_size]
            for start in range(0, size, BLOCK_BYTES)
        ]

        def fetch() -> None:
            with ThreadPoolExecutor(THREADS) as pool:
                for _ in pool.map(lambda block: block[0].read_once(*block[1:]), blocks):
                    pass

        name = f"fetch only, + {delay_ms:g} ms"
        return Subject(
            name, fetch, units=self.images, prepare=lambda: self._away(name, delay_ms), note=f"{THREADS} connections, no view made"
        )

    def extra(self) -> dict[str, dict[str, float]]:
        """Returns the medians of the waits for the first batch, and how long a round trip is."""
        found = {name: {FIRST: median(values)} for name, values in self.first_ms.items()}
        for name, ms in self._round_trip_ms.items():
            found.setdefault(name, {})["ms of a round trip"] = ms
        return found

    def _subject(self, name: str, data: str, prepare: Callable[[], object], *, note: str = "") -> Subject:
        def ready() -> None:
            prepare()
            shutil.rmtree(self._cache, ignore_errors=True)
            cache = {"cache": str(self._cache), "cache_gib": self._size.cache_share * self.data_bytes / 2**30}
            config = DataConfig(train=data, workers=1, traversal="local", window_mib=self._size.window_mib, **cache)
            views = ViewPair(size_px=self._size.size_px)
            self._loader = build_loader(config, views=views, seed=self._size.seed, global_batch=self._size.batch)

        def epoch() -> None:
            assert self._loader is not None
            began = time.perf_counter()
            with self._loader as loader:
                batches = iter(loader)
                next(batches)
                self.first_ms[name].append(1000 * (time.perf_counter() - began))
                for _ in batches:
                    pass

        return Subject(name, epoch, units=self.images, prepare=ready, note=note)

    def _warm(self) -> None:
        for path in self._shards:
            path.read_bytes()

    def _away(self, name: str, delay_ms: float) -> None:
        from fsspec.implementations.http import HTTPFileSystem

        self._warm()
        self._link.set_delay(delay_ms)
        # New connections: those of the row before would go on with its round trip in mind (BBR for ten seconds), and be far too slow.
        HTTPFileSystem.clear_instance_cache()
        self._round_trip_ms[name] = self._link.round_trip_ms()


def drop_pages(path: Path) -> None:
    """Drops a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
