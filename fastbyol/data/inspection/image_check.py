"""Checks one converted image: its checksum, its size, that it decodes, and that it is the same picture as its original."""

from __future__ import annotations

import zlib

import numpy as np
from PIL import Image

from fastbyol.data.backends.source import Pixels, ThreadBuffer
from fastbyol.data.conversion.encode import TURNS, find_turbojpeg
from fastbyol.data.formats.jpeg_header import exif_orientation, read_jpeg_header, scans_complaint
from fastbyol.data.formats.pillow_decoding import MAX_DECODED_PIXELS, UndecodableImage, as_rgb, decode_with_pillow, load_image
from fastbyol.data.inputs.listing import ImageListing
from fastbyol.data.inspection.converted import Converted

TOLERATED_LEVELS = 12.0
"""Largest accepted difference between an original and its transcoded image: mean absolute difference of the 8x8 block means, of 255 levels.

JPEG keeps it below 6, even at quality 10 and for noise; for two different photographs it is 30 to 100."""
_BLOCK_PX = 8


class ImageCheck:
    """Checks the images of a conversion by index. May be used from several threads at once."""

    def __init__(self, images: Converted, *, originals: ImageListing | None = None) -> None:
        """originals: the complete listing that was converted; None skips the comparison with the originals."""
        self._images, self._originals = images, originals
        self._decoder = find_turbojpeg()
        self._scratch = ThreadBuffer()

    def faults(self, index: int) -> list[str]:
        """Returns what is wrong with the image. A fault that makes further checks meaningless is returned alone."""
        images = self._images
        try:
            data = images.read(index)
        except OSError as error:
            return [f"cannot be read ({error})"]
        if images.crc32 is not None and zlib.crc32(data) != images.crc32[index]:
            return ["its bytes have changed since the conversion (CRC-32)"]
        height, width = int(images.height[index]), int(images.width[index])
        if not images.raw[index]:
            if complaint := self._jpeg_complaint(index, data):
                return [complaint]
        elif len(data) != 3 * height * width:
            return [f"{len(data):,} bytes for {width}x{height} pixels"]
        return [] if self._originals is None else self._differences(index, data, self._originals)

    def _jpeg_complaint(self, index: int, data: bytes) -> str:
        header, images = read_jpeg_header(data), self._images
        if header is None and images.height[index]:
            return "is not a JPEG, and training decodes nothing else"
        # Training decodes a .beton with TurboJPEG only. In tars DALI also decodes rare JPEGs, and other programs' tars may hold other formats.
        if self._decoder is None or header is None or not (header.is_common or images.path.is_file()):
            try:
                height, width, _ = decode_with_pillow(data).shape
            except UndecodableImage as error:
                return f"does not decode ({error})"
            return self._size_complaint(index, height, width)
        if complaint := self._size_complaint(index, header.height, header.width) or scans_complaint(header):
            return complaint
        if header.height * header.width > MAX_DECODED_PIXELS:
            return f"has {header.width}x{header.height} pixels, more than the {MAX_DECODED_PIXELS:,} that are decoded"
        complaint, fatal = self._decoder.decode(data, self._scratch.pixels(header.height, header.width))
        # If a checksum shows that the bytes are unchanged, a warning is harmless: the conversion accepted and noted it.
        return f"does not decode ({complaint})" if complaint and (fatal or self._images.crc32 is None) else ""

    def _size_complaint(self, index: int, height: int, width: int) -> str:
        told = int(self._images.height[index]), int(self._images.width[index])
        if told in ((0, 0), (height, width)):  # sizes are unknown for a tar that was not converted by us
            return ""
        return f"is {width}x{height} pixels, its table says {told[1]}x{told[0]}"

    def _differences(self, index: int, data: bytes, originals: ImageListing) -> list[str]:
        position = int(self._images.listed[index])
        location, label = originals.location(position), originals.labels[position]
        faults = []
        if label != (told := self._images.label[index]):
            faults.append(f"has the label {told}, its original {location.name} has {label}")
        try:
            original = location.read()
            if original != data and (distance := self._distance(index, data, original)) > TOLERATED_LEVELS:
                faults.append(f"shows another picture than its original {location.name} (on average {distance:.0f} of 255 levels apart)")
        except (UndecodableImage, OSError) as error:
            faults.append(f"cannot be compared: its original {location.name} does not decode ({error})")
        return faults

    def _distance(self, index: int, data: bytes, original: bytes) -> float:
        """Returns the difference from the original, which is rotated and resized as the conversion may have done; 255 for another shape."""
        shape = int(self._images.height[index]), int(self._images.width[index]), 3
        stored = np.frombuffer(data, dtype=np.uint8).reshape(shape) if self._images.raw[index] else decode_with_pillow(data)
        opened = load_image(original)
        candidates = [as_rgb(opened)]
        if (orientation := exif_orientation(opened)) != 1:
            candidates.append(candidates[0].transpose(TURNS[orientation]))
        return min(_mean_distance(stored, candidate) for candidate in candidates)


def _mean_distance(stored: Pixels, original: Image.Image) -> float:
    height, width, _ = stored.shape
    scale = max(height, width) / max(original.size)
    if abs(original.height * scale - height) > 1 or abs(original.width * scale - width) > 1:
        return 255.0
    resized = original if original.size == (width, height) else original.resize((width, height), Image.Resampling.BICUBIC)
    # Means of 8x8 blocks: JPEG changes single pixels much and these hardly. int16, because uint8 differences wrap around.
    means = [np.asarray(picture.reduce(_BLOCK_PX), dtype=np.int16) for picture in (Image.fromarray(stored), resized)]
    return float(np.abs(means[0] - means[1]).mean())
