"""A conversion task: images, order, output and options; and the work folder in which the output is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import require, require_at_least, require_choice
from fastbyol.data.conversion.encode import EncodeSettings
from fastbyol.data.conversion.encoding_worker import Job
from fastbyol.data.conversion.work_folder import UNFINISHED, WorkFolder, work_path
from fastbyol.data.formats.manifest import software_versions
from fastbyol.data.inputs.images import list_images
from fastbyol.data.inputs.listing import ImageListing, names_digest
from fastbyol.data.replacements import damage_allowed
from fastbyol.host.cores import default_workers

Images = Path | ImageListing | Callable[[], ImageListing]
"""The images to convert: a folder or tar, its listing, or a function that makes the listing once all other arguments have been checked."""


@dataclass(frozen=True)
class ConversionOptions:
    """Options of a conversion. Only `encode` affects the bytes of the result."""

    encode: EncodeSettings = field(default_factory=EncodeSettings)
    strict: bool = False
    """Stop at the first image that cannot be kept."""
    max_dropped: float | None = None
    """Largest share of images that may be dropped. 1 allows any, even whole classes; None allows 1 %, or 20 images if that is more."""
    unfinished: str = "continue"
    """Treatment of an unfinished conversion to the same output: 'continue' it if there is one, 'require' one, or 'restart' without it."""
    flush_every_s: float = 10.0
    """Seconds between two saved points; a crash loses at most this much work."""
    patience_s: float = 0.0
    """Seconds to wait for another process that is writing the same output, before that is an error."""

    def __post_init__(self) -> None:
        if self.max_dropped is not None:
            require(0.0 <= self.max_dropped <= 1.0, "max-dropped", self.max_dropped, "a share in [0, 1]")
        require_choice("unfinished", self.unfinished, UNFINISHED)
        require_at_least("flush-every", self.flush_every_s, 0.0)

    def dropped_allowed(self, images: int) -> int:
        """Returns how many of this number of images may be dropped."""
        if self.max_dropped is None:
            return damage_allowed(images)
        return math.floor(self.max_dropped * images + 1e-6)


@dataclass(frozen=True)
class Task:
    """Everything that a conversion needs to know."""

    listing: ImageListing
    order: NDArray[np.int64]
    """Positions in the listing, in the order of conversion."""
    sizes: NDArray[np.int64]
    """Size in bytes of every file of the listing."""
    listing_sha256: str
    out: Path
    options: ConversionOptions
    workers: int

    def job(self, index: int) -> Job:
        return Job(index, self.listing.location(index))


def as_listing(data: Images) -> ImageListing:
    """Returns the listing of the images; lists a folder or tar, or calls the function."""
    if isinstance(data, Path):
        return list_images(data)
    return data if isinstance(data, ImageListing) else data()


def make_task(data: Images, *, order: Callable[[int], NDArray[np.int64]], out: Path, options: ConversionOptions, workers: int) -> Task:
    """Returns the task. order: gives the order for a number of images; workers: number of worker processes, 0 means one per core."""
    listing = as_listing(data)
    require_at_least("workers", workers, 0)
    num = len(listing.files)
    sizes = np.array([listing.num_bytes(index) for index in range(num)], dtype=np.int64)
    chosen = order(num)
    return Task(listing, chosen, sizes, listing.digest(), out, options, min(workers or default_workers(), len(chosen)))


def open_work(task: Task, *, kind: str, settings: Mapping[str, Any]) -> WorkFolder:
    """Opens the work folder in which the output is written. Its identity is everything that the result depends on."""
    names = chain(task.listing.class_names, task.listing.files, map(str, task.listing.labels))
    identity = {"kind": kind, "images": len(task.listing.files), "names_and_labels": names_digest(names), **settings, **software_versions()}
    options = task.options
    return WorkFolder(
        work_path(task.out),
        output=task.out,
        identity=identity,
        unfinished=options.unfinished,
        flush_every_s=options.flush_every_s,
        patience_s=options.patience_s,
    )
