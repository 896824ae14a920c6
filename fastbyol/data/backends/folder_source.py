"""The folder backend: reads an ImageFolder with Pillow. It needs no conversion, and is the reference for the two fast backends."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from fastbyol.data.backends.source import Indices, Pixels, Source, damaged, some_of
from fastbyol.data.formats.manifest import sha256_of
from fastbyol.data.formats.pillow_decoding import UndecodableImage, decode_with_pillow, image_size
from fastbyol.data.inputs.folder import list_image_folder
from fastbyol.data.inputs.listing import left_out_text

log = logging.getLogger("fastbyol")
_COMPARED_BYTES = 1 << 20


class FolderSource(Source):
    """An ImageFolder as a source; sample i is the i-th file of its listing."""

    def __init__(self, path: Path) -> None:
        self._listing = list_image_folder(path)
        super().__init__(labels=np.array(self._listing.labels, dtype=np.int64), class_names=self._listing.class_names)
        for note in self._listing.notes:
            log.warning("%s", note)
        if text := left_out_text(self._listing.skipped):
            log.warning("%s: left out: %s", path, text)
        # (height, width), filled as images are first used: opening a million files in advance would take too long.
        self._sizes = np.zeros((self.num_samples, 2), dtype=np.int64)

    def sizes(self, indices: Indices) -> tuple[Indices, Indices]:
        for index in indices[self._sizes[indices, 0] == 0].tolist():
            try:
                self._sizes[index] = image_size(self._listing.path(index))
            except (UndecodableImage, OSError) as error:
                raise damaged(self.sample_name(index), error) from error
        height, width = self._sizes[indices].T
        return height, width

    def identity(self) -> bytes:
        """Returns a digest of all file names and of the length and first bytes of some files: opening a million would take too long."""
        digest = hashlib.sha256("\0".join(self._listing.files).encode(errors="surrogateescape"))
        for index in some_of(self.num_samples):
            path = self._listing.path(index)
            with suppress(OSError):  # a file that cannot be read is named by whoever decodes it
                digest.update(f"{path.stat().st_size} {sha256_of(path, size=_COMPARED_BYTES)}".encode())
        return digest.digest()

    def decode(self, indices: Indices) -> Iterator[Pixels]:
        for index in indices.tolist():
            try:
                image = decode_with_pillow(self._listing.path(index).read_bytes())
            except (UndecodableImage, OSError) as error:
                raise damaged(self.sample_name(index), error) from error
            height, width = self._sizes[index].tolist()
            if height and image.shape != (height, width, 3):  # the crops were drawn for the header's size
                found = f"{image.shape[1]}x{image.shape[0]}"
                raise damaged(self.sample_name(index), f"it has {found} pixels, its header said {width}x{height}")
            yield image

    def sample_name(self, index: int) -> str:
        return f"image {index} ({self._listing.path(index)})"

    def image_name(self, index: int) -> str:
        return self._listing.files[index]
