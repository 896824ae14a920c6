"""The folder backend: reads images where they are, in folders, tars or lists, with Pillow. It is the reference for the two fast backends."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

import numpy as np

from fastbyol.data.backends.source import Indices, Pixels, RangeReader, Source, damaged, some_of
from fastbyol.data.formats.manifest import sha256_of
from fastbyol.data.formats.pillow_decoding import UndecodableImage, decode_with_pillow, image_size
from fastbyol.data.inputs.listing import ImageListing, left_out_text

log = logging.getLogger("fastbyol")
_COMPARED_BYTES = 1 << 20


@cache
def _warn_once(text: str) -> None:
    """Logs a warning, once in a process: a report opens the same images several times."""
    log.warning("%s", text)


class FolderSource(Source):
    """A listing of original images as a source; sample i is the i-th image of the listing."""

    def __init__(self, listing: ImageListing) -> None:
        self._listing = listing
        super().__init__(labels=np.array(self._listing.labels, dtype=np.int64), class_names=self._listing.class_names)
        for note in self._listing.notes:
            _warn_once(note)
        if text := left_out_text(self._listing.skipped):
            _warn_once(f"{listing.root}: left out: {text}")
        # (height, width), filled as images are first used: opening a million files in advance would take too long.
        self._sizes = np.zeros((self.num_samples, 2), dtype=np.int32)

    def sizes(self, indices: Indices) -> tuple[Indices, Indices]:
        for index in indices[self._sizes[indices, 0] == 0].tolist():
            try:
                location = self._listing.location(index)
                # Pillow reads only the header of a file; a byte range of a tar is read whole, and comes from the page cache when it is decoded.
                self._sizes[index] = image_size(location.path if location.size is None else location.read())
            except (UndecodableImage, OSError) as error:
                raise damaged(self.sample_name(index), error) from error
        height, width = self._sizes[indices].astype(np.int64).T
        return height, width

    def storage(self) -> tuple[Indices, Indices]:
        places = self._listing.places
        return super().storage() if places is None else (np.frombuffer(places.container, np.int32), np.frombuffer(places.offsets, np.int64))

    def read_ahead(self, indices: Indices) -> None:
        locations = [self._listing.location(index) for index in indices.tolist()]
        reader = RangeReader(locations[0].path)
        try:
            reader.read_ahead(min(at.offset for at in locations), max(at.offset + (at.size or 0) for at in locations))
        finally:
            reader.close()

    def identity(self) -> Iterator[bytes]:
        """Yields a digest of all file names and of the length and first bytes of some files: opening a million would take too long."""
        digest = hashlib.sha256(memoryview(self._listing.names.block[:-1]))
        for index in some_of(self.num_samples):
            with suppress(OSError):  # a file that cannot be read is named by whoever decodes it
                location = self._listing.location(index)
                size = location.path.stat().st_size if location.size is None else location.size
                first = sha256_of(location.path, start=location.offset, size=min(size, _COMPARED_BYTES))
                digest.update(f"{size} {first}".encode())
        yield digest.digest()

    def decode(self, indices: Indices) -> Iterator[Pixels]:
        for index in indices.tolist():
            try:
                image = decode_with_pillow(self._listing.location(index).read())
            except (UndecodableImage, OSError) as error:
                raise damaged(self.sample_name(index), error) from error
            height, width = self._sizes[index].tolist()
            if height and image.shape != (height, width, 3):  # the crops were drawn for the header's size
                found = f"{image.shape[1]}x{image.shape[0]}"
                raise damaged(self.sample_name(index), f"it has {found} pixels, its header said {width}x{height}")
            yield image

    def sample_name(self, index: int) -> str:
        location = self._listing.location(index)
        inside = "" if location.size is None else f", {location.name}"
        return f"image {index} ({location.path}{inside})"

    def image_name(self, index: int) -> str:
        return self._listing.files[index]
