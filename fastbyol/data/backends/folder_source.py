"""The folder backend: reads images where they are, in folders, tars or lists, here or at URLs, with Pillow. It is the reference for the two
fast backends.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.data.backends.source import Indices, Pixels, RangeReader, Source, some_of
from fastbyol.data.formats.pillow_decoding import UndecodableImage, decode_with_pillow, image_size
from fastbyol.data.inputs.listing import ImageListing, left_out_text
from fastbyol.host.store_path import StorePath, at_once

log = logging.getLogger("fastbyol")
_COMPARED_BYTES = 1 << 20


@cache
def _warn_once(text: str) -> None:
    """Logs a warning, once in a process: a report opens the same images several times."""
    log.warning("%s", text)


class FolderSource(Source):
    """A listing of original images as a source; sample i is the i-th image of the listing."""

    is_original = True
    way_out_of_damage = "replace or remove the image; python -m fastbyol convert leaves out all that do not decode, and names them"

    def __init__(self, listing: ImageListing) -> None:
        self._listing = listing
        super().__init__(labels=np.array(self._listing.labels, dtype=np.int64), class_names=self._listing.class_names)
        for note in self._listing.notes:
            _warn_once(note)
        if text := left_out_text(self._listing.skipped):
            _warn_once(f"{listing.root}: left out: {text}")
        # (height, width), filled as images are first used: opening a million files in advance would take too long.
        self._sizes = np.zeros((self.num_samples, 2), dtype=np.int32)
        # Bytes of images at URLs, fetched for their sizes and used once more, when the same images are decoded.
        self._fetched: dict[int, bytes] = {}

    def sizes(self, indices: Indices) -> tuple[Indices, Indices]:
        for index in indices[self._sizes[indices, 0] == 0].tolist():
            try:
                location = self._listing.location(index)
                # Pillow reads only the header of a file; a byte range of a tar is read whole, and comes from the page cache when it is decoded.
                if isinstance(location.path, StorePath):
                    data = location.read()
                    self._sizes[index] = image_size(data)
                    self._fetched[index] = data  # last: another thread may take it at once
                else:
                    self._sizes[index] = image_size(location.path if location.size is None else location.read())
            except (UndecodableImage, OSError) as error:
                raise self._unusable(index, error) from error
        height, width = self._sizes[indices].astype(np.int64).T
        return height, width

    def storage(self) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        places = self._listing.places
        return super().storage() if places is None else (np.frombuffer(places.container, np.int32), np.frombuffer(places.offsets, np.int64))

    def read_ahead(self, indices: Indices) -> None:
        locations = [self._listing.location(index) for index in indices.tolist()]
        if isinstance(locations[0].path, StorePath):
            return  # there is no page cache to read it into
        reader = RangeReader(locations[0].path)
        try:
            reader.read_ahead(min(at.offset for at in locations), max(at.offset + (at.size or 0) for at in locations))
        finally:
            reader.close()

    def identity(self) -> Iterator[bytes]:
        """Yields a digest of all file names and of the length and first bytes of some files: opening a million would take too long."""
        digest = hashlib.sha256(self._listing.names.block[:-1].data)
        for found in at_once(self._size_and_beginning, some_of(self.num_samples)):
            if found is not None:
                digest.update(f"{found[0]} {hashlib.sha256(found[1]).hexdigest()}".encode())
        yield digest.digest()

    def _size_and_beginning(self, index: int) -> tuple[int, bytes] | None:
        """Returns an image's number of bytes and the first of them; None if it cannot be read, which whoever decodes it reports."""
        location = self._listing.location(index)
        try:
            if isinstance(location.path, StorePath):
                data = location.read()
                return len(data), data[:_COMPARED_BYTES]
            with location.path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size if location.size is None else location.size
                return size, os.pread(file.fileno(), min(size, _COMPARED_BYTES), location.offset)
        except OSError:
            return None

    def decode(self, indices: Indices) -> Iterator[Pixels]:
        for index in indices.tolist():
            try:
                data = self._fetched.pop(index, None)
                image = decode_with_pillow(self._listing.location(index).read() if data is None else data)
            except (UndecodableImage, OSError) as error:
                raise self._unusable(index, error) from error
            height, width = self._sizes[index].tolist()
            if height and image.shape != (height, width, 3):  # the crops were drawn for the header's size
                found = f"{image.shape[1]}x{image.shape[0]}"
                raise self.damaged(index, f"it has {found} pixels, its header said {width}x{height}")
            yield image

    def _unusable(self, index: int, error: UndecodableImage | OSError) -> UserError:
        """Returns the error for an image that does not decode, or whose file cannot be read at all."""
        if isinstance(error, UndecodableImage):
            return self.damaged(index, error)
        return UserError(f"{self.sample_name(index)} cannot be read ({error.strerror or error}): put it back, or take it out of the data")

    def sample_name(self, index: int) -> str:
        location = self._listing.location(index)
        inside = "" if location.size is None else f", {location.name}"
        return f"image {index} ({location.path}{inside})"

    def image_name(self, index: int) -> str:
        return self._listing.files[index]
