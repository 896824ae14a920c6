"""The interface of a backend: returns the decoded pixels of any sample by index.

Sample order, augmentation, batching, threads and resuming are handled elsewhere, the same for all backends.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.data.backends.block_cache import BlockCache, CachedFile
from fastbyol.host.shared_columns import row_pieces

Pixels = NDArray[np.uint8]
Indices = NDArray[np.int64]
READ_AHEAD_BYTES = 1 << 20
"""Bytes that read-ahead fetches per system call."""
_COMPARED = 256
"""Number of images whose bytes ranks compare if no table has their digests."""


class DamagedImage(UserError):
    """Raised for an image that is there but does not decode."""

    def __init__(self, what: str, way_out: str, index: int) -> None:
        super().__init__(what, way_out, index)  # as pickle will call it again
        self.what, self.way_out, self.index = what, way_out, index

    def __str__(self) -> str:
        return f"{self.what}: {self.way_out}"


class Source(ABC):
    """A data set of num_samples images with one label each, decoded on demand. `decode` may be called from several threads at once."""

    is_original = False
    """True for images as they were found, of which some may be damaged; False for converted data, whose every byte was read before."""
    way_out_of_damage = "copy the data again, or replace or remove the image and convert again"

    def __init__(self, *, labels: Indices, class_names: tuple[str, ...]) -> None:
        self.labels = labels
        """(num_samples,) int64 class of each image."""
        self.class_names = class_names
        """Name of each class."""
        self.cache: BlockCache | None = None
        """The cache that keeps the images of a store on this disk; None for images that lie on a disk."""

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @abstractmethod
    def sizes(self, indices: Indices) -> tuple[Indices, Indices]:
        """Returns heights and widths in pixels, (N,) int64 each, without decoding."""

    @abstractmethod
    def decode(self, indices: Indices) -> Iterator[Pixels]:
        """Yields each image as RGB (H, W, 3) uint8, C-contiguous, valid only until the next one is requested.

        Raises DamagedImage for a damaged image instead of returning black pixels.
        """

    @abstractmethod
    def sample_name(self, index: int) -> str:
        """Returns the sample's index and file, as a user would look for it."""

    def damaged(self, index: int, reason: object) -> DamagedImage:
        """Returns the error for a sample that does not decode."""
        return DamagedImage(f"{self.sample_name(index)} does not decode ({reason})", self.way_out_of_damage, index)

    def image_name(self, index: int) -> str:
        """Returns the image's name in the listing, by which results name it; its number where the format keeps no names."""
        return f"{index:08d}"

    def fingerprint(self) -> dict[str, str]:
        """Returns short texts that identify this data set: number of images; digests of class names, labels and image identity."""
        texts = {"class names": [repr(self.class_names).encode()], "labels": column_bytes(self.labels), "images": self.identity()}
        return {"number of images": str(self.num_samples)} | {name: _digest(pieces)[:12] for name, pieces in texts.items()}

    def identity(self) -> Iterator[bytes]:
        """Yields, in pieces, bytes that are very unlikely to be equal for other images, found without decoding: sizes and locations."""
        for side in (0, 1):
            for piece in row_pieces(self.num_samples):
                yield self.sizes(np.arange(piece.start, piece.stop, dtype=np.int64))[side].tobytes()
        for column in self.storage():
            yield from column_bytes(column)

    def storage(self) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        """Returns the location of every sample: number of its file and offset of its first byte there, (num_samples,) each.

        Raises UserError for a backend with one file per sample: no reading order is faster than another there.
        """
        raise UserError(
            "data.traversal: each image is a file of its own, so local and sharded have no blocks to read at once; use random, or convert the images"
        )

    def read_ahead(self, indices: Indices) -> None:
        """Reads all bytes from the first to the last of these samples of one file, so that they are in the page cache."""
        raise NotImplementedError

    def read_checked(self, index: int, file: RangeReader | CachedFile, offset: int, size: int, *, crc32: int | None) -> bytes:
        """Returns the sample's bytes if they have the checksum of the conversion (None: there is none). Raises UserError if not: a decoder
        misses some damage.
        """
        data = file.read(offset, size)
        if crc32 is not None and zlib.crc32(data) != crc32 and zlib.crc32(data := file.read_again(offset, size)) != crc32:
            raise self.damaged(index, "its bytes have changed since the conversion")
        return data

    def close(self) -> None:  # noqa: B027 (a backend without open files has nothing to do)
        """Closes files and decoders. May be called more than once."""


class RangeReader:
    """Reads byte ranges of one file from any thread.

    Uses pread, not a memory map: if somebody truncates a mapped file, the process dies of SIGBUS; here it is a UserError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        # pread leaves the file's position alone, so threads may share the descriptor.
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise UserError(
                f"{self.path}: ended at byte {os.fstat(self._descriptor).st_size} while being read; was it replaced? Convert it again"
            )
        return data

    def read_again(self, offset: int, size: int) -> bytes:
        """Reads bytes again that differ from those of the conversion; helps only with the cache of a store, see `CachedFile`."""
        return self.read(offset, size)

    def read_ahead(self, start: int, end: int) -> None:
        """Reads the bytes [start, end) and discards them.

        The hint posix_fadvise is not enough: Linux limits it to a fraction of a MiB and some network file systems ignore it.
        """
        piece = bytearray(READ_AHEAD_BYTES)
        for at in range(start, end, READ_AHEAD_BYTES):
            os.preadv(self._descriptor, [memoryview(piece)[: end - at]], at)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class ThreadBuffer(threading.local):
    """A buffer of its own for each thread, for one decoded image. It grows on demand: new memory for each image costs page faults.

    Stock FFCV allocates max height x max width x batch instead, 70 GB on raw ImageNet.
    """

    def __init__(self) -> None:
        self._bytes = np.empty(0, dtype=np.uint8)

    def pixels(self, height: int, width: int) -> Pixels:
        """Returns the buffer as an image (height, width, 3), valid until this thread's next call."""
        size = height * width * 3
        if len(self._bytes) < size:
            self._bytes = np.empty(size, dtype=np.uint8)
        return self._bytes[:size].reshape(height, width, 3)


def column_bytes(column: NDArray[np.integer]) -> Iterator[bytes]:
    """Yields the bytes of a column, as its `tobytes()` would return them, in pieces."""
    for piece in row_pieces(len(column)):
        yield column[piece].tobytes()


def _digest(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def some_of(num_samples: int) -> list[int]:
    """Returns the numbers of a few images, spread evenly over all."""
    return np.unique(np.linspace(0, num_samples - 1, _COMPARED).astype(np.int64)).tolist()
