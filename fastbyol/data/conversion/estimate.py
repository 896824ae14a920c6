"""Estimates a conversion's disk space and time from a sample of the images, and checks that there is enough space."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import Lost, UserError
from fastbyol.data.conversion.encode import UNREACHABLE, UNREADABLE, EncodedImage
from fastbyol.data.conversion.encoding_pool import EncodingPool
from fastbyol.data.conversion.encoding_worker import Job
from fastbyol.host.quantities import bytes_text

_SMALLEST_SAMPLE, _LARGEST_SAMPLE, _SHARE = 16, 256, 50


@dataclass(frozen=True)
class Estimate:
    """Estimate for the images that are not converted yet: their number, output bytes, and seconds."""

    images: int
    bytes: float
    seconds: float
    sampled: int
    """Number of images that were tried."""
    dropped: tuple[str, ...] = ()
    """Name and reason of each tried image that could be read but not kept."""


def estimate_conversion(
    pool: EncodingPool, order: NDArray[np.int64], sizes: NDArray[np.int64], *, job: Callable[[int], Job], bytes_per_image: int
) -> Estimate:
    """Estimates the conversion by encoding a sample of images and discarding the result.

    Args:
        pool: the worker processes of the conversion.
        order: (N,) indices of the images to convert.
        sizes: (num_samples,) size in bytes of every image's file.
        job: returns the job for an image's index.
        bytes_per_image: overhead of the output per image.
    """
    size = min(len(order), max(_SMALLEST_SAMPLE, min(len(order) // _SHARE, _LARGEST_SAMPLE)))
    picked = order[np.unique(np.linspace(0, len(order) - 1, size).astype(int))]
    stored = read = 0
    dropped = []
    started = time.monotonic()
    first = None
    for number, image in enumerate(pool.encode(job(index) for index in picked.tolist()), start=1):
        first = first or time.monotonic()
        read += int(sizes[picked[number - 1]])
        if isinstance(image, EncodedImage):
            stored += len(image.data)
        elif image.reason == UNREACHABLE:
            raise Lost(f"{job(int(picked[number - 1])).location.name}: {image.detail}")
        elif image.reason != UNREADABLE:  # unreadable files may mean a lost disk, which the conversion itself detects
            dropped.append(f"{job(int(picked[number - 1])).location.name}: {image.reason} ({image.detail})")
    # The time to the first result includes the start of the processes: leave it out.
    now = time.monotonic()
    seconds_per_image = (now - first) / (len(picked) - 1) if first and len(picked) > 1 else now - started
    total = float(sizes[order].sum()) * (stored / read if read else 0.0) + len(order) * bytes_per_image
    return Estimate(len(order), total, len(order) * seconds_per_image, len(picked), tuple(dropped))


def require_space(folder: Path, estimate: Estimate) -> int:
    """Returns the free bytes on the folder's disk. Raises UserError if the estimate exceeds them."""
    free = shutil.disk_usage(folder).free
    if estimate.bytes > free:
        raise UserError(
            f"{folder}: the output needs about {bytes_text(estimate.bytes)} more and {bytes_text(free)} are free; make room, write "
            "elsewhere (--out), or store less (--max-side, --quality)"
        )
    return free
