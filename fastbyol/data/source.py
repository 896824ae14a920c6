"""What a backend is: the decoded pixels of any sample, by index. Order, augmentation, batches, threads and resume are not its business."""

from __future__ import annotations

import hashlib
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError

Pixels = NDArray[np.uint8]
Indices = NDArray[np.int64]
READ_AHEAD_BYTES = 1 << 20
"""Fetched by one call of the system."""


_COMPARED = 256
"""Images of which ranks compare the bytes where no table has their digests."""


class Storage(NamedTuple):
    """Of each sample, (num_samples,): the number of its file, and its first byte there."""

    file: Indices
    offset: Indices


class Source(ABC):
    """A data set that decodes: num_samples images with a label each. `decode` may be called from several threads at once."""

    def __init__(self, *, labels: Indices, class_names: tuple[str, ...]) -> None:
        self.labels = labels
        """(num_samples,) int64 class of each image."""
        self.class_names = class_names
        """Name of each class."""

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @abstractmethod
    def sizes(self, indices: Indices) -> tuple[Indices, Indices]:
        """Heights and widths in pixels, (N,) int64 each, without decoding."""

    @abstractmethod
    def decode(self, indices: Indices) -> Iterator[Pixels]:
        """Yields each image: RGB (H, W, 3) uint8, C-contiguous, valid until the next is taken. UserError if damaged, never black."""

    @abstractmethod
    def sample_name(self, index: int) -> str:
        """The sample as a user would look for it: its index and file."""

    def fingerprint(self) -> dict[str, str]:
        """What tells this data set from another one, a short text each: number of images, digests of names, labels, and of the images' identity."""
        texts = {"class names": repr(self.class_names).encode(), "labels": self.labels.tobytes(), "images": self.identity()}
        return {"number of images": str(self.num_samples)} | {name: hashlib.sha256(text).hexdigest()[:12] for name, text in texts.items()}

    def identity(self) -> bytes:
        """Bytes that other images would hardly share, without decoding any: sizes and places."""
        everything = np.arange(self.num_samples, dtype=np.int64)
        return b"".join(column.tobytes() for column in (*self.sizes(everything), *self.storage()))

    def storage(self) -> Storage:
        """Where the samples lie. UserError for a backend whose samples share no file: then no order of reading is better than another."""
        raise UserError(
            "data.traversal = 'local': an image folder has one file per image, nothing to read in one go; use random or convert it"
        )

    def read_ahead(self, indices: Indices) -> None:
        """Fetches the bytes from the first to the last of these samples of one file, so that the system keeps them in memory."""
        raise NotImplementedError

    def checked(self, index: int, data: bytes, crc32: int) -> bytes:
        """The sample's bytes, if they are those of the conversion: a decoder notices only some of the possible damage."""
        if zlib.crc32(data) != crc32:
            raise damaged(self.sample_name(index), "its bytes have changed since the conversion")
        return data

    def close(self) -> None:  # noqa: B027 (a backend without open files has nothing to do)
        """Lets go of files and decoders. More than once does no harm."""


class RangeReader:
    """Reads byte ranges of one file from any thread.

    pread and not a memory map: a file that somebody cuts while it is mapped kills the process (SIGBUS), here it is a UserError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise UserError(
                f"{self.path}: ended at byte {os.fstat(self._descriptor).st_size} while being read; was it replaced? Convert it again"
            )
        return data

    def read_ahead(self, start: int, end: int) -> None:
        """Reads and drops: a hint (posix_fadvise) is cut to a fraction of a MiB by Linux and ignored by some network file systems."""
        piece = bytearray(READ_AHEAD_BYTES)
        for at in range(start, end, READ_AHEAD_BYTES):
            os.preadv(self._descriptor, [memoryview(piece)[: end - at]], at)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def some_of(num_samples: int) -> list[int]:
    """Returns the numbers of a few images, spread evenly over all."""
    return np.unique(np.linspace(0, num_samples - 1, _COMPARED).astype(np.int64)).tolist()


def damaged(name: str, error: object) -> UserError:
    """The error for a sample that does not decode."""
    return UserError(f"{name} does not decode ({error}): replace or remove the image (and convert again, where it was converted)")
