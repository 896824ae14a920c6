"""What is to be converted, in which order, to where; and the folder in which it grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import require_at_least
from fastbyol.data.conversion.encoding_pool import default_workers
from fastbyol.data.conversion.encoding_worker import Job
from fastbyol.data.conversion.options import ConversionOptions
from fastbyol.data.conversion.work_folder import WorkFolder
from fastbyol.data.inputs.images import list_images
from fastbyol.data.inputs.listing import ImageListing, names_digest
from fastbyol.data.manifest import software_versions

Images = Path | ImageListing | Callable[[], ImageListing]
"""What is converted: a folder or tar, its listing, or what makes the listing when all else has been found in order."""


@dataclass(frozen=True)
class Task:
    """What is to be converted."""

    listing: ImageListing
    order: NDArray[np.int64]
    """Positions in the listing."""
    sizes: NDArray[np.int64]
    """Bytes of every file of the listing."""
    listing_sha256: str
    out: Path
    options: ConversionOptions
    workers: int

    def job(self, index: int) -> Job:
        return Job(index, self.listing.location(index))

    def with_largest(self, stored_bytes: int) -> Task:
        """The task for an output that takes no larger image."""
        encode = replace(self.options.encode, max_stored_bytes=stored_bytes)
        return replace(self, options=replace(self.options, encode=encode))


def as_listing(data: Images) -> ImageListing:
    """The listing, made if it is not there yet."""
    if isinstance(data, Path):
        return list_images(data)
    return data if isinstance(data, ImageListing) else data()


def make_task(listing: ImageListing, *, order: NDArray[np.int64], out: Path, options: ConversionOptions, workers: int) -> Task:
    """workers: processes; 0: one per core."""
    require_at_least("workers", workers, 0)
    sizes = np.array([listing.num_bytes(index) for index in range(len(listing.files))], dtype=np.int64)
    return Task(listing, order, sizes, listing.digest(), out, options, min(workers or default_workers(), len(order)))


def open_work(path: Path, task: Task, *, kind: str, settings: Mapping[str, Any]) -> WorkFolder:
    """The folder in which the output grows. Its identity is all that the result depends on."""
    names = chain(task.listing.class_names, task.listing.files, map(str, task.listing.labels))
    identity = {"kind": kind, "images": len(task.listing.files), "names_and_labels": names_digest(names), **settings, **software_versions()}
    options = task.options
    return WorkFolder(path, output=task.out, identity=identity, unfinished=options.unfinished, flush_every_s=options.flush_every_s)
