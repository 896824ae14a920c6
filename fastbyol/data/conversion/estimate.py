"""Before the work: how much room and time it will take, from a sample of the images, and whether there is as much room."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.data.conversion.encode import UNREADABLE, EncodedImage
from fastbyol.data.conversion.encoding_pool import EncodingPool
from fastbyol.data.conversion.encoding_worker import Job
from fastbyol.data.quantities import bytes_text, duration_text

_SMALLEST_SAMPLE, _LARGEST_SAMPLE, _SHARE = 16, 256, 50


@dataclass(frozen=True)
class Estimate:
    """Of what is still to be done."""

    images: int
    bytes: float
    seconds: float
    sampled: int
    """Images that were tried."""
    dropped: tuple[str, ...] = ()
    """Of those, the ones that were read and cannot be kept: name and reason."""

    def text(self, *, workers: int, free_bytes: int) -> str:
        many = "worker process" if workers == 1 else "worker processes"
        return (
            f"{self.images:,} images to go: about {bytes_text(self.bytes)} and {duration_text(self.seconds)} with {workers} {many}; "
            f"{bytes_text(free_bytes)} are free"
        )


def estimate_conversion(
    pool: EncodingPool, order: NDArray[np.int64], sizes: NDArray[np.int64], *, job: Callable[[int], Job], bytes_per_image: int
) -> Estimate:
    """Encodes a sample and throws it away.

    Args:
        pool: the workers that will do the work.
        order: (N,) the images to come.
        sizes: (num_samples,) bytes of every image's file.
        job: of an image.
        bytes_per_image: that the output needs beside the image itself.
    """
    picked = order[np.unique(np.linspace(0, len(order) - 1, _sample_size(len(order))).astype(int))]
    stored = read = 0
    dropped = []
    started = time.monotonic()
    first = None
    for number, image in enumerate(pool.encode(job(index) for index in picked.tolist()), start=1):
        first = first or time.monotonic()
        read += int(sizes[picked[number - 1]])
        if isinstance(image, EncodedImage):
            stored += len(image.data)
        elif image.reason != UNREADABLE:  # the disk's fault: the work itself finds out whether it is gone
            dropped.append(f"{job(int(picked[number - 1])).location.name}: {image.reason} ({image.detail})")
    # The first result waits for the processes to start.
    now = time.monotonic()
    seconds_per_image = (now - first) / (len(picked) - 1) if first and len(picked) > 1 else now - started
    total = float(sizes[order].sum()) * (stored / read if read else 0.0) + len(order) * bytes_per_image
    return Estimate(len(order), total, len(order) * seconds_per_image, len(picked), tuple(dropped))


def require_space(folder: Path, estimate: Estimate) -> int:
    """The free bytes where `folder` is. UserError if the estimate is more."""
    free = shutil.disk_usage(folder).free
    if estimate.bytes > free:
        raise UserError(
            f"{folder}: the output needs about {bytes_text(estimate.bytes)} more and {bytes_text(free)} are free; make room, write "
            "elsewhere (--out), or store less (--max-side, --quality)"
        )
    return free


def _sample_size(images: int) -> int:
    return min(images, max(_SMALLEST_SAMPLE, min(images // _SHARE, _LARGEST_SAMPLE)))
