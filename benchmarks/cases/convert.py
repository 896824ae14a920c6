"""Measures the conversion of an image folder to each fast format, per image, with as many worker processes as the rivals get.

How: generated ImageNet-like JPEG files (`imagenet_like.py`), each under several names. Conversions are complete: processes started,
an estimate from a sample, every image checked, checksums, everything forced to disk. Reference: FFCV's own DatasetWriter, which
decodes and re-encodes every image and does not flush to the disk. Ceiling: reading every file and decoding it completely, in as many
processes, and writing nothing. The file cache is warm.

    python -m benchmarks.run convert

Why: we copy the images' own bytes, so nothing is encoded. To check an image, its Huffman codes are read to the end but not turned
into pixels. TurboJPEG is used only in case of doubt, and for a process's first 1,000 images (all of --quick), which would not pay for
loading the compiled check. That leaves more than enough time to send the bytes to the writing process, write and hash them: the whole
conversion costs less CPU time than decoding alone. CPU time is that of all processes; wall time depends on the disk and, with few
images, on starting the processes.
"""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.imagenet_like import copy_names, write_imagenet_like
from benchmarks.record import CaseResult, measured
from benchmarks.rivals.read_and_decode import read_and_decode
from benchmarks.rivals.stock_ffcv import MISSING, QUALITY, write_with_stock_ffcv
from benchmarks.timing import subjects_of
from fastbyol.config.errors import UserError
from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.data.conversion.encode import find_turbojpeg
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.data.inputs.folder import list_image_folder

REFERENCE, CEILING = "ffcv DatasetWriter", "read + decode only"
BETON, TAR = "to_ffcv", "to_dali"


@dataclass(frozen=True)
class Size:
    images: int
    """Number of different images."""
    copies: int
    """Names of each: a process decodes by another way after its first 1,000 images, so there must be many."""
    rounds: int
    workers: int = 2
    scale: float = 1.0
    """Scale of ImageNet's image sides."""
    seed: int = 0


QUICK = Size(images=40, copies=6, rounds=6)
FULL = Size(images=400, copies=40, rounds=7)


def run(size: Size, *, scratch: Path) -> CaseResult:
    if find_turbojpeg() is None:
        raise UserError(f"without TurboJPEG there is no ceiling to compare with: {MISSING}")
    folder = write_imagenet_like(scratch / "images", images=size.images, scale=size.scale, seed=size.seed)
    copy_names(folder, size.copies)  # thousands of different images would take longer to draw than to convert
    outputs = {REFERENCE: scratch / "stock.beton", BETON: scratch / "ours.beton", TAR: scratch / "ours"}
    listing = list_image_folder(folder)
    given: dict[str, Any] = {"workers": size.workers, "overwrite": "replace"}
    work = {
        REFERENCE: lambda: write_with_stock_ffcv(listing, outputs[REFERENCE], workers=size.workers),
        BETON: lambda: write_beton(folder, out=outputs[BETON], **given),
        TAR: lambda: write_tar_shards(folder, out=outputs[TAR], **given),
        CEILING: lambda: read_and_decode(folder, workers=size.workers),
    }
    notes = {REFERENCE: f"re-encodes, quality {QUALITY}", CEILING: "writes nothing"}
    subjects = subjects_of(work, units=len(listing.files), notes=notes)
    title = f"an image folder converted by {size.workers} worker processes"
    with contextlib.redirect_stderr(io.StringIO()):  # the converters' progress
        result = measured("convert", title, subjects, reference=REFERENCE, ceiling=CEILING, threads=size.workers, settings=size)
    source_bytes = sum(os.path.getsize(str(listing.path(index))) for index in range(len(listing.files)))
    return result.with_extra({name: {"bytes for a byte of input": _bytes_of(out) / source_bytes} for name, out in outputs.items()})


def _bytes_of(out: Path) -> int:
    return sum(path.stat().st_size for path in ([out] if out.is_file() else out.iterdir()))
