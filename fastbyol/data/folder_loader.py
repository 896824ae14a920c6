"""The folder backend: an ImageFolder read with Pillow. Nothing to prepare, and the reference for the two fast ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fastbyol.data.inputs.folder import list_image_folder
from fastbyol.data.source import PILLOW_ERRORS, Indices, Pixels, Source, damaged, decode_with_pillow

_SIZES_COMPARED = 256


class FolderSource(Source):
    """Sample i is the i-th file of the ImageFolder listing."""

    def __init__(self, path: Path) -> None:
        self._listing = list_image_folder(path)
        super().__init__(labels=np.array(self._listing.labels, dtype=np.int64), class_names=self._listing.class_names)
        # Filled as the headers are read: the sizes of a million files are not worth a pass of their own.
        self._sizes = np.zeros((self.num_samples, 2), dtype=np.int64)

    def sizes(self, indices: Indices) -> tuple[Indices, Indices]:
        for index in indices[self._sizes[indices, 0] == 0].tolist():
            self._sizes[index] = self._header_size(index)
        height, width = self._sizes[indices].T
        return height, width

    def identity(self) -> bytes:
        """The files' names, and how long some of them are: opening a million headers is not worth it."""
        some = np.unique(np.linspace(0, self.num_samples - 1, _SIZES_COMPARED).astype(np.int64)).tolist()
        lengths = [path.stat().st_size if (path := self._listing.path(index)).exists() else -1 for index in some]
        return "\0".join(self._listing.files).encode(errors="surrogateescape") + repr(lengths).encode()

    def decode(self, indices: Indices) -> Iterator[Pixels]:
        for index in indices.tolist():
            yield self._decode_one(index)

    def sample_name(self, index: int) -> str:
        return f"image {index} ({self._listing.path(index)})"

    def _decode_one(self, index: int) -> Pixels:
        try:
            return decode_with_pillow(self._listing.path(index).read_bytes())
        except PILLOW_ERRORS as error:
            raise damaged(self.sample_name(index), error) from error

    def _header_size(self, index: int) -> tuple[int, int]:
        try:
            with Image.open(self._listing.path(index)) as image:
                return image.height, image.width
        except PILLOW_ERRORS as error:
            raise damaged(self.sample_name(index), error) from error
