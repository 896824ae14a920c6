"""How fast the disk of a path reads: from front to back, and in pieces of an image's size at random places."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from pathlib import Path

from fastbyol.config.errors import UserError
from fastbyol.doctor.finding import Finding
from fastbyol.host.quantities import bytes_text

TRIAL_BYTES, BLOCK, IMAGE_BYTES = 256 << 20, 8 << 20, 112 << 10
"""IMAGE_BYTES: the mean size of ImageNet's training images."""
SECONDS = 3.0
"""At most this long for each way of reading."""


def disk_finding(path: Path) -> Finding:
    """Measures a file by reading parts of it, a folder by writing a temporary file of 256 MiB into it. Raises UserError if it cannot be read."""
    try:
        if path.is_dir():
            speeds = _of_folder(path)
        elif path.stat().st_size < IMAGE_BYTES:
            raise UserError(f"--path {path}: is too small to measure a disk with; give a folder, or a data set's file")
        else:
            speeds = _of_file(path)
    except OSError as error:
        raise UserError(
            f"--path {path}: cannot be measured ({error.strerror}); give a file that you may read, or a folder that you may write into"
        ) from error
    if speeds is None:
        needed = bytes_text(2 * TRIAL_BYTES)
        return Finding("disk", str(path), "low", f"less than {needed} free: not measured", "make room, or give a file to read")
    sequential, images_per_s = speeds
    text = f"reads {sequential / 1e6:,.0f} MB/s from front to back, {images_per_s:,.0f} images/s of {IMAGE_BYTES >> 10} KiB at random places (one reader)"
    return Finding("disk", str(path), "ok", text)


def _of_folder(folder: Path) -> tuple[float, float] | None:
    if shutil.disk_usage(folder).free < 2 * TRIAL_BYTES:
        return None
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".fastbyol-doctor-") as file:
        for _ in range(TRIAL_BYTES // BLOCK):
            file.write(os.urandom(BLOCK))
        file.flush()
        os.fsync(file.fileno())
        return _of_file(Path(file.name))


def _of_file(path: Path) -> tuple[float, float]:
    """Returns bytes/s read in order and images/s read at random, both from the disk as far as the system lets its cache be emptied."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        # Each place once, in a random order: a second read of it would come from the system's cache.
        places = random.Random(0).sample(range(size // IMAGE_BYTES), min(4000, size // IMAGE_BYTES))
        random_s, images = _timed(descriptor, lambda count: places[count] * IMAGE_BYTES if count < len(places) else None, IMAGE_BYTES)
        in_order_s, blocks = _timed(descriptor, lambda count: count * BLOCK if count * BLOCK < size else None, BLOCK)
        return min(size, blocks * BLOCK) / in_order_s, images / random_s
    finally:
        os.close(descriptor)


def _timed(descriptor: int, place_at, length: int) -> tuple[float, int]:
    """Returns the seconds and the number of reads. place_at(count): where the next read begins, None at the end."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    begin, count = time.perf_counter(), 0
    while (place := place_at(count)) is not None and time.perf_counter() - begin < SECONDS:
        os.pread(descriptor, length, place)
        count += 1
    return max(time.perf_counter() - begin, 1e-9), count
