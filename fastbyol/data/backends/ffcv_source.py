"""The FFCV backend: reads a .beton file and decodes with libffcv's TurboJPEG, without FFCV's Loader.

FFCV's Loader sets torch's thread count, returns buffers that it later overwrites, swallows the exceptions of its thread, ignores the decoder's
return code (a damaged image turns black), and compiles for seconds in each process. So only its C library is loaded (`formats/turbojpeg.py`).
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.data.backends.block_cache import CachedFile
from fastbyol.data.backends.source import Indices, Pixels, RangeReader, Source, ThreadBuffer, column_bytes, some_of
from fastbyol.data.backends.store_tables import StoreTables
from fastbyol.data.formats.beton import RAW_MODE, Beton, read_beton
from fastbyol.data.formats.manifest import beton_manifest_path, numbered_class_names, read_manifest, refuse_other_counts
from fastbyol.data.formats.turbojpeg import TurboJpeg

log = logging.getLogger("fastbyol")


class FfcvSource(Source):
    """A .beton as a source, written by us or by stock FFCV, JPEG or raw; sample i is row i. Class names come from its manifest, if any."""

    def __init__(self, path: Path, *, store: StoreTables | None = None) -> None:
        """store: the store that has the images, if `path` holds the tables only."""
        self._decoder = TurboJpeg()
        self._beton = table = read_beton(path)
        super().__init__(labels=self._beton.label, class_names=_class_names(path, self._beton))
        self._file: RangeReader | CachedFile
        if store is None:
            self._file = RangeReader(path)
        else:
            if table.crc32 is None:
                raise UserError(
                    f"{path}: has no checksums (another program wrote it), so what a store sends could not be checked; copy it to a disk, or "
                    "convert with python -m fastbyol convert"
                )
            only = np.zeros(self.num_samples, dtype=np.int64)
            self.cache = store.cache([path.name], file=only, offset=table.offset, size=table.size, crc32=table.crc32)
            (self._file,) = self.cache.open_files()
        self._scratch = ThreadBuffer()

    def sizes(self, indices: Indices) -> tuple[Indices, Indices]:
        return self._beton.height[indices].astype(np.int64), self._beton.width[indices].astype(np.int64)

    def decode(self, indices: Indices) -> Iterator[Pixels]:
        table = self._beton
        rows = (column[indices].tolist() for column in (table.offset, table.size, table.height, table.width, table.mode))
        for index, offset, size, height, width, mode in zip(indices.tolist(), *rows, strict=True):
            crc32 = None if table.crc32 is None else int(table.crc32[index])
            data = self.read_checked(index, self._file, offset, size, crc32=crc32)
            if mode == RAW_MODE:
                yield np.frombuffer(data, dtype=np.uint8).reshape(height, width, 3)  # read_beton has compared the sizes
                continue
            image = self._scratch.pixels(height, width)
            complaint, fatal = self._decoder.decode(data, image)
            # If a checksum shows that the bytes are unchanged, a warning is harmless: Pillow ignored it too when the image was converted
            # (stray bytes before a marker: ImageNet has some). Without checksums, treat it as damage.
            if complaint and (fatal or table.crc32 is None):
                raise self.damaged(index, complaint)
            yield image

    def storage(self) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        return np.broadcast_to(np.int64(0), self.num_samples), self._beton.offset  # a column of zeros that takes no memory

    def read_ahead(self, indices: Indices) -> None:
        ends = self._beton.offset[indices] + self._beton.size[indices]
        self._file.read_ahead(int(self._beton.offset[indices].min()), int(ends.max()))

    def identity(self) -> Iterator[bytes]:
        """Yields what distinguishes the images, bytes included: raw images have equal sizes and offsets whatever they show."""
        table, crc32 = self._beton, self._beton.crc32
        if crc32 is None:
            places = ((int(table.offset[index]), int(table.size[index])) for index in some_of(self.num_samples))
            crc32 = np.array([zlib.crc32(self._file.read(*place)) for place in places])
        yield from super().identity()
        yield from column_bytes(crc32)

    def sample_name(self, index: int) -> str:
        return f"image {index} of {self._file.path}"

    def close(self) -> None:
        self._file.close()


def _class_names(path: Path, beton: Beton) -> tuple[str, ...]:
    """Returns the manifest's class names, or class numbers if there is no manifest."""
    labels, manifest_path = beton.label, beton_manifest_path(path)
    if not manifest_path.exists():
        if beton.crc32 is not None:  # it is a file of ours
            log.warning("%s: is missing, so classes have numbers for names and labels cannot be checked; copy it too", manifest_path)
        return numbered_class_names(path, labels)
    manifest = read_manifest(manifest_path)
    if manifest.shards[0].bytes != path.stat().st_size or manifest.num_samples != len(labels):
        raise UserError(
            f"{path}: is not the file that {manifest_path.name} describes; convert again, or delete the manifest if it is left over"
        )
    refuse_other_counts(path, labels, manifest)
    return manifest.class_names
