"""One converted image against everything that is known of it: its checksum, its size, its decoder, its original."""

from __future__ import annotations

import threading
import zlib

import numpy as np
from PIL import Image, ImageOps

from fastbyol.data.conversion.encode import find_turbojpeg
from fastbyol.data.inputs.listing import ImageListing
from fastbyol.data.inspection.converted import Converted
from fastbyol.data.jpeg_header import exif_orientation, read_jpeg_header, scans_complaint
from fastbyol.data.pillow_decoding import MAX_DECODED_PIXELS, UndecodableImage, as_rgb, decode_with_pillow, load_image
from fastbyol.data.source import Pixels

TOLERATED_LEVELS = 12.0
"""Mean distance, of 255 levels, between the means of 8x8 pixels of an original and of its transcoded image: JPEG keeps those to within 6
even at quality 10 and however noisy the image; those of two different photographs are 30 to 100 apart."""
_BLOCK_PX = 8


class ImageCheck:
    """Checks images of a conversion by number; from several threads at once."""

    def __init__(self, images: Converted, *, originals: ImageListing | None = None) -> None:
        """originals: the whole listing that was converted."""
        self._images, self._originals = images, originals
        self._decoder = find_turbojpeg()
        self._local = threading.local()

    def faults(self, index: int) -> list[str]:
        """What is wrong with the image; the first fault that makes the others meaningless stands alone."""
        images = self._images
        try:
            data = images.read(index)
        except OSError as error:
            return [f"cannot be read ({error})"]
        if images.crc32 is not None and zlib.crc32(data) != images.crc32[index]:
            return ["its bytes have changed since the conversion (CRC-32)"]
        complaint = self._raw_complaint(index, data) if images.raw[index] else self._jpeg_complaint(index, data)
        if complaint:
            return [complaint]
        return [] if self._originals is None else self._differences(index, data, self._originals)

    def _raw_complaint(self, index: int, data: bytes) -> str:
        height, width = int(self._images.height[index]), int(self._images.width[index])
        return "" if len(data) == 3 * height * width else f"{len(data):,} bytes for {width}x{height} pixels"

    def _jpeg_complaint(self, index: int, data: bytes) -> str:
        header, images = read_jpeg_header(data), self._images
        if header is None and images.height[index]:
            return "is no JPEG, and nothing else is decoded while training"
        # Of a .beton TurboJPEG decodes everything, of a tar DALI also rare kinds, and of a foreign tar, which has no sizes, whoever reads it.
        if self._decoder is None or header is None or not (header.is_common or images.path.is_file()):
            return self._pillow_complaint(index, data)
        if complaint := self._size_complaint(index, header.height, header.width) or scans_complaint(data):
            return complaint
        if header.height * header.width > MAX_DECODED_PIXELS:
            return f"has {header.width}x{header.height} pixels, more than the {MAX_DECODED_PIXELS:,} that are decoded"
        complaint, fatal = self._decoder.decode(data, self._scratch(header.height, header.width))
        # With a checksum these are the bytes that were accepted, and a warning is an oddity that the conversion has noted.
        return f"does not decode ({complaint})" if complaint and (fatal or self._images.crc32 is None) else ""

    def _pillow_complaint(self, index: int, data: bytes) -> str:
        try:
            height, width, _ = decode_with_pillow(data).shape
        except UndecodableImage as error:
            return f"does not decode ({error})"
        return self._size_complaint(index, height, width)

    def _size_complaint(self, index: int, height: int, width: int) -> str:
        told = int(self._images.height[index]), int(self._images.width[index])
        if told in ((0, 0), (height, width)):  # a foreign tar has no table of sizes
            return ""
        return f"is {width}x{height} pixels, its table says {told[1]}x{told[0]}"

    def _differences(self, index: int, data: bytes, originals: ImageListing) -> list[str]:
        position = int(self._images.listed[index])
        location, label = originals.location(position), originals.labels[position]
        faults = [f"has the label {self._images.label[index]}, its original {location.name} has {label}"]
        faults = faults if label != self._images.label[index] else []
        try:
            original = location.read()
            if original != data and (distance := self._distance(index, data, original)) > TOLERATED_LEVELS:
                faults.append(f"is not the picture of its original {location.name} ({distance:.0f} of 255 levels apart on average)")
        except (UndecodableImage, OSError) as error:
            faults.append(f"cannot be compared: its original {location.name} does not decode ({error})")
        return faults

    def _distance(self, index: int, data: bytes, original: bytes) -> float:
        """Mean difference of the pixels, the original turned and resized as a conversion may have done; of another shape: 255."""
        shape = int(self._images.height[index]), int(self._images.width[index]), 3
        stored = np.frombuffer(data, dtype=np.uint8).reshape(shape) if self._images.raw[index] else decode_with_pillow(data)
        opened = load_image(original)
        picture, orientation = as_rgb(opened), exif_orientation(opened)
        candidates = [picture] if orientation == 1 else [picture, _turned(picture, orientation)]
        return min(_mean_distance(stored, candidate) for candidate in candidates)

    def _scratch(self, height: int, width: int) -> Pixels:
        """This thread's buffer, grown on demand: fresh memory for each image costs a page fault per 4 KiB."""
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < height * width * 3:
            buffer = self._local.buffer = np.empty(height * width * 3, dtype=np.uint8)
        return buffer[: height * width * 3].reshape(height, width, 3)


def _turned(picture: Image.Image, orientation: int) -> Image.Image:
    exif = picture.getexif()
    exif[0x0112] = orientation
    return ImageOps.exif_transpose(picture)


def _mean_distance(stored: Pixels, original: Image.Image) -> float:
    height, width, _ = stored.shape
    scale = max(height, width) / max(original.size)
    if abs(original.height * scale - height) > 1 or abs(original.width * scale - width) > 1:
        return 255.0
    resized = original if original.size == (width, height) else original.resize((width, height), Image.Resampling.BICUBIC)
    means = [np.asarray(picture.reduce(_BLOCK_PX), dtype=np.int16) for picture in (Image.fromarray(stored), resized)]
    return float(np.abs(means[0] - means[1]).mean())
