"""Writes an ImageFolder as a .beton that any FFCV reader opens, with each JPEG's own bytes in it.

FFCV's own writer re-encodes every JPEG (a generation loss, 2.4 times slower) and hangs for ever when one of its worker processes dies.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastbyol.config.errors import UserError
from fastbyol.data.beton import (
    ALLOCATION,
    FIELD,
    HEADER,
    JPEG_MODE,
    MAX_PAGE_BYTES,
    MIN_PAGE_BYTES,
    SAMPLE,
    VERSION,
    field_descriptors,
)
from fastbyol.data.conversion import ImageSummary, appears_whole, encoded_samples, finished_shard, flush_to_disk, make_manifest
from fastbyol.data.encode import TRANSCODE_QUALITY, EncodedImage
from fastbyol.data.image_folder import ImageFolder, list_image_folder
from fastbyol.data.manifest import Manifest, beton_manifest_path, write_manifest


def write_beton(data: Path, *, out: Path, workers: int = 0, overwrite: str = "refuse") -> Manifest:
    """Converts the ImageFolder `data` to the file `out` and a manifest beside it; row i is the i-th image of the listing.

    Args:
        data: folder with one sub-folder of images per class.
        out: the .beton to make; `out`.json is the manifest.
        workers: processes that read and check images; 0: one per core.
        overwrite: 'refuse' an existing `out`, or 'replace' it.

    Raises:
        UserError: no such folder, an image that does not decode, an existing output, a worker that died.
    """
    if out.suffix != ".beton":
        raise UserError(f"--out {out}: must end in .beton")
    listing = list_image_folder(data)
    summary = ImageSummary()
    with appears_whole(out, overwrite=overwrite == "replace") as temporary:
        with temporary.open("wb") as file:
            pages = _BetonFile(file, num_samples=len(listing.files), page_bytes=_page_bytes(listing))
            for index, image in encoded_samples(listing, range(len(listing.files)), workers=workers, what=out.name):
                pages.add(index, image, label=listing.labels[index], name=listing.files[index])
                summary.add(image)
            pages.finish()
        shard = finished_shard(temporary, name=out.name, samples=len(listing.files))
        settings: dict[str, int | str] = {"page_bytes": pages.page_bytes, "transcode_quality": TRANSCODE_QUALITY}
        manifest = make_manifest("beton", listing, summary, [shard], settings)
        # The manifest goes first: a file without one loses its class names silently, a manifest of another file is noticed at open.
        with appears_whole(beton_manifest_path(out), overwrite=True) as manifest_temporary:
            write_manifest(manifest_temporary, manifest)
            flush_to_disk(manifest_temporary)
    return manifest


def _page_bytes(listing: ImageFolder) -> int:
    """A power of two that holds the largest file: FFCV's page cache wants each image within one page."""
    largest = max(listing.path(index).stat().st_size for index in range(len(listing.files)))
    page = max(MIN_PAGE_BYTES, 1 << max(largest - 1, 0).bit_length())
    if page > MAX_PAGE_BYTES:
        raise UserError(f"{listing.root}: an image of {largest:,} bytes is too large for a .beton page; make it smaller")
    return page


class _BetonFile:
    """Writes images one after another, then the tables. Pages are counted from the start of the file, so none is lost to a first one."""

    def __init__(self, file: BinaryIO, *, num_samples: int, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self._file, self._at = file, HEADER.itemsize + 2 * FIELD.itemsize + num_samples * SAMPLE.itemsize
        self._samples = np.zeros(num_samples, dtype=SAMPLE)
        self._allocations = np.zeros(num_samples, dtype=ALLOCATION)
        self._checksums = np.zeros(num_samples, dtype="<u4")

    def add(self, index: int, image: EncodedImage, *, label: int, name: str) -> None:
        size = len(image.jpeg)
        if size > self.page_bytes:
            raise UserError(f"{name}: {size:,} bytes after transcoding, a page holds {self.page_bytes:,}; make the image smaller")
        if self._at // self.page_bytes != (self._at + size - 1) // self.page_bytes:
            self._at += -self._at % self.page_bytes
        self._file.seek(self._at)
        self._file.write(image.jpeg)
        self._samples[index] = ((JPEG_MODE, image.width, image.height, self._at), label)
        self._allocations[index] = (index, self._at, size)
        self._checksums[index] = image.crc32
        self._at += size

    def finish(self) -> None:
        """Checksums, then the allocation table, which must end the file. The header is written last: an unfinished file has none."""
        self._file.seek(self._at)
        self._file.write(self._checksums.tobytes() + self._allocations.tobytes())
        header = np.zeros(1, dtype=HEADER)
        header[0] = (VERSION, 2, self.page_bytes, len(self._samples), self._at + self._checksums.nbytes)
        self._file.seek(0)
        self._file.write(header.tobytes() + field_descriptors(checksums_at=self._at).tobytes() + self._samples.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
