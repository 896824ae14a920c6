"""Measures two whole BYOL views of an image from its file, for each backend, on one thread.

How: generated ImageNet-like JPEG files (`imagenet_like.py`), converted to a .beton and to tar shards. Each backend processes them in
three ways: decode only (read, check the CRC if there is one, decode), crops (two uint8 crops at the output size), views (the whole
augmentation). Reference: torchvision.transforms on Pillow images. Rivals: lightly's BYOLTransform if installed, DALI doing everything
with its own operations, and FFCV's own Loader with a pipeline for each view, as in FFCV-SSL (`rivals/stock_ffcv.py`; not with
--quick, because it compiles for 20 s). Ceiling: TurboJPEG alone on bytes in memory. The file cache is warm, so no disk is measured.
Then each of our backends' views with more threads, as images/s of the wall clock, and for six more epochs the growth of the process
in the last three (MiB); a batch of 50 is 57 MiB.

    python -m benchmarks.run loader

Why: nearly all of the reference's time is augmentation: each operation passes over the whole view and makes a new image. Our kernel
keeps a view in cache and computes only the operations it drew, so decoding is a third or more of our time. Backends differ only in
their decoder; crops and everything after them are one kernel for all. FFCV's own way decodes twice, and its colour operations make a
float64 image each, so it takes several times our time for less work. The work is done by threads, not processes, so the process's CPU
clock sees all of it.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.imagenet_like import stored_for, write_imagenet_like
from benchmarks.record import CaseResult, measured
from benchmarks.rivals import those_installed
from benchmarks.rivals.dali_native_views import DIFFERENCES as DALI_DIFFERENCES
from benchmarks.rivals.dali_native_views import dali_native_loader
from benchmarks.rivals.stock_ffcv import DIFFERENCES, StockFfcvLoader
from benchmarks.rivals.views import LightlyLoader, TorchvisionLoader
from benchmarks.timing import measure, subjects_of, torch_threads
from fastbyol.config.errors import UserError
from fastbyol.config.schema import DataConfig
from fastbyol.config.views import ViewPair
from fastbyol.data import build_loader
from fastbyol.data.backends.dali_source import DaliSource
from fastbyol.data.backends.ffcv_source import FfcvSource
from fastbyol.data.backends.folder_source import FolderSource
from fastbyol.data.backends.source import Source
from fastbyol.data.formats.pillow_decoding import decode_with_pillow
from fastbyol.data.formats.turbojpeg import TurboJpeg
from fastbyol.data.inputs.folder import list_image_folder
from fastbyol.data.loader import TwoViewLoader
from fastbyol.data.renderer import MAX_CHUNK
from fastbyol.tuning.candidates import worker_counts

REFERENCE, CEILING = "torchvision on Pillow: views", "TurboJPEG: decode only, bytes in memory"
SOURCES: dict[str, Callable[[Path], Source]] = {
    "ffcv": FfcvSource,
    "dali": DaliSource,
    "folder": lambda path: FolderSource(list_image_folder(path)),
}
OURS = tuple(f"{backend}: views" for backend in SOURCES)
LIGHTLY, DALI_NATIVE, STOCK_FFCV = "lightly: views", "dali, its own operations: views", "ffcv's own Loader: views"
NOTES = {
    CEILING: "no file read, no CRC",
    REFERENCE: "antialiased, other colour operations",
    LIGHTLY: "bilinear, other colour operations",
    STOCK_FFCV: DIFFERENCES,
    DALI_NATIVE: DALI_DIFFERENCES,
}


@dataclass(frozen=True)
class Size:
    """images: a multiple of batch. scale: scale of ImageNet's image sides. slow: include rows and columns that take long."""

    images: int
    batch: int
    rounds: int
    size_px: int = 224
    scale: float = 1.0
    seed: int = 0
    slow: bool = True


QUICK = Size(images=30, batch=15, rounds=9, slow=False)
FULL = Size(images=350, batch=50, rounds=9)


def run(size: Size, *, scratch: Path) -> CaseResult:
    folder = write_imagenet_like(scratch / "images", images=size.images, scale=size.scale, seed=size.seed)
    paths = {backend: stored_for(backend, folder, out=scratch) for backend in SOURCES}
    views = ViewPair(size_px=size.size_px)
    skipped: dict[str, str] = {}
    work = {CEILING: _turbojpeg_pass(folder), REFERENCE: _epochs(TorchvisionLoader(folder, views, batch=size.batch))}
    rivals = {name: _epochs(loader) for name, loader in those_installed(_rivals(paths, size, views, skipped), skipped).items()}
    work |= rivals
    with ExitStack() as opened:
        for backend, path in paths.items():
            try:
                work |= _backend(backend, path, size, views, opened)
            except UserError as error:
                skipped[backend] = str(error)
        subjects = subjects_of(work, units=size.images, notes=NOTES, rivals={*rivals, DALI_NATIVE})
        title = f"two {size.size_px} px views of an image from its JPEG file"
        with torch_threads(1):
            result = measured("loader", title, subjects, reference=REFERENCE, ceiling=CEILING, settings=size, skipped=skipped)
            if size.slow:
                result = result.with_extra(_rates_by_threads({name: paths[name] for name in paths if name not in skipped}, size, views))
            # After the timed rounds, so that every cache and ring of buffers has its usual size.
            return result.with_extra({name: {"MiB of growth in 3 epochs": _growth_mib(work[name])} for name in OURS if name in work})


def _rivals(paths: dict[str, Path], size: Size, views: ViewPair, skipped: dict[str, str]) -> dict[str, Callable[[], Iterable[object]]]:
    """Returns makers of the loaders that are there only if their package is."""
    makers: dict[str, Callable[[], Iterable[object]]] = {
        LIGHTLY: lambda: LightlyLoader(paths["folder"], size_px=size.size_px, batch=size.batch)
    }
    if size.slow:
        makers[STOCK_FFCV] = lambda: StockFfcvLoader(paths["ffcv"], views, batch=size.batch, seed=size.seed)
    else:
        skipped[STOCK_FFCV] = "compiles for 20 s: only without --quick"
    return makers


def _backend(backend: str, path: Path, size: Size, views: ViewPair, opened: ExitStack) -> dict[str, Callable[[], None]]:
    """Returns the backend's three subjects, and DALI's own way of making views."""
    source = SOURCES[backend](path)
    opened.callback(source.close)
    loaders = {
        f"{backend}: {what}": _open(backend, path, size, views, workers=1, output=output)
        for what, output in (("crops", "uint8"), ("views", "float32"))
    }
    if backend == "dali":
        loaders[DALI_NATIVE] = dali_native_loader(path, views, batch=size.batch, workers=1, seed=size.seed)
    epochs = {name: _epochs(opened.enter_context(loader)) for name, loader in loaders.items()}
    return {f"{backend}: decode only": partial(_decode_all, source), **epochs}


def _open(backend: str, path: Path, size: Size, views: ViewPair, *, workers: int, output: str = "float32") -> TwoViewLoader:
    config = DataConfig(train=str(path), backend=backend, workers=workers)
    return build_loader(config, views=views, seed=size.seed, global_batch=size.batch, output=output)


def _rates_by_threads(paths: dict[str, Path], size: Size, views: ViewPair) -> dict[str, dict[str, float]]:
    """Returns images/s of each backend's views by the wall clock, with 2, 4, ... threads up to the number of cores available."""
    rates: dict[str, dict[str, float]] = {f"{backend}: views": {} for backend in paths}
    for threads in worker_counts(len(os.sched_getaffinity(0)))[1:]:
        with ExitStack() as opened:
            work = {
                f"{backend}: views": _epochs(opened.enter_context(_open(backend, path, size, views, workers=threads)))
                for backend, path in paths.items()
            }
            for name, timing in measure(subjects_of(work, units=size.images), rounds=size.rounds).items():
                rates[name][f"images/s with {threads} threads"] = 1000 / median(timing.ms["wall"])
    return rates


def _growth_mib(epoch: Callable[[], object]) -> float:
    """Returns the growth of this process's resident memory in three epochs, after three that bring it to its usual level."""
    resident = []
    for _ in range(2):
        for _ in range(3):
            epoch()
        resident.append(_resident_mib())
    return round(resident[1] - resident[0], 1)


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _decode_all(source: Source) -> None:
    """Decodes all images in index order, in the chunks that a loader's thread takes."""
    for first in range(0, source.num_samples, MAX_CHUNK):
        deque(source.decode(np.arange(first, min(first + MAX_CHUNK, source.num_samples))), maxlen=0)


def _turbojpeg_pass(folder: Path) -> Callable[[], None]:
    listing = list_image_folder(folder)
    jpegs = [listing.path(index).read_bytes() for index in range(len(listing.files))]
    shapes = [decode_with_pillow(jpeg).shape for jpeg in jpegs]
    # One output for all images, as in a loader's thread: it stays in cache, and no page of it is touched for the first time.
    largest = np.empty(max(map(math.prod, shapes)), dtype=np.uint8)
    jobs = [(jpeg, largest[: math.prod(shape)].reshape(shape)) for jpeg, shape in zip(jpegs, shapes, strict=True)]
    decoder = TurboJpeg()

    def decode_all() -> None:
        for jpeg, out in jobs:
            decoder.decode(jpeg, out)

    return decode_all


def _epochs(loader: Iterable[object]) -> Callable[[], None]:
    """Returns a function that runs the loader's next epoch, with new crops and a new order."""
    return lambda: deque(loader, maxlen=0).clear()
