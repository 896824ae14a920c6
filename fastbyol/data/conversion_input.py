"""Where a conversion finds the images of a listing: the only file that knows what kind of listing it is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.data.image_folder import ImageFolder, list_image_folder


@dataclass(frozen=True, slots=True)
class FileLocation:
    """An image that is a file of its own."""

    name: str
    path: Path

    def read(self) -> bytes:
        """The file's bytes. Raises OSError."""
        return self.path.read_bytes()


def as_listing(data: Path | ImageFolder) -> ImageFolder:
    """The listing, made if a folder is given."""
    return list_image_folder(data) if isinstance(data, Path) else data


def locate(listing: ImageFolder, index: int) -> FileLocation:
    """Of sample i, for a worker process."""
    return FileLocation(listing.files[index], listing.path(index))


def source_sizes(listing: ImageFolder) -> NDArray[np.int64]:
    """(num_samples,) bytes of each image; 0 where the system won't say."""
    return np.array([_file_size(listing.path(index)) for index in range(len(listing.files))], dtype=np.int64)


def skipped_entries(listing: ImageFolder) -> tuple[tuple[str, str], ...]:
    """(name, reason) of what the listing left out."""
    return getattr(listing, "skipped", ())


def names_digest(names: tuple[str, ...]) -> str:
    """sha256 of the names in order, each ended by a zero byte."""
    lines = hashlib.sha256()
    for name in names:
        lines.update(name.encode(errors="surrogateescape") + b"\0")
    return lines.hexdigest()


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
