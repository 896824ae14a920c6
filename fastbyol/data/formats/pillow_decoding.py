"""Decodes any image file to RGB pixels with Pillow.

Pillow's readers raise exceptions of many kinds (struct.error, KeyError, zlib.error …), even for damaged comments, colour profiles and EXIF
that do not affect the pixels. Here every failure becomes an UndecodableImage, and damaged metadata never makes an image undecodable.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, UnidentifiedImageError

from fastbyol.data.formats.jpeg_header import read_jpeg_header, scans_complaint, without_metadata

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are read. Not PostScript, for which Pillow starts Ghostscript, nor rare formats, whose readers are poorly tested."""
MAX_DECODED_PIXELS = 178_956_970
"""Most pixels of an image that training decodes, whatever a table or header says: Pillow's own limit, half a gigabyte of RGB."""
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_TIFF_BITS, _TIFF_RANGES = 258, ((340, 341), (280, 281))  # BitsPerSample; S{Min,Max}SampleValue, {Min,Max}SampleValue
_COMMON_MAXIMA = (255, 4095, 65535)
_PIXELS_AT_A_TIME = 1 << 18
# Pillow warns of damaged EXIF and of many pixels, for each image anew; what matters is raised.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UndecodableImage(ValueError):
    """Raised for an image that cannot be decoded. `reason` is one of a few fixed phrases; the message has the details."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class PixelRange(NamedTuple):
    """The values of black and white in an image of floats or of integers with more than 8 bits."""

    black: float
    white: float
    stated: bool
    """True if the file states the range; False if it was guessed from the pixels."""


def decode_with_pillow(data: bytes) -> NDArray[np.uint8]:
    """Returns the (H, W, 3) RGB pixels of any image file's bytes; EXIF orientation is not applied. Raises UndecodableImage."""
    return np.asarray(as_rgb(load_image(data)))


def load_image(data: bytes, *, check_size: Callable[[int, int], None] | None = None) -> Image.Image:
    """Returns the decoded image; the first frame if the file has several.

    Args:
        data: the file's bytes.
        check_size: called with (width, height) from the header before anything is decoded; may raise UndecodableImage.

    Raises:
        UndecodableImage: the data is not an image, or is damaged. A MemoryError is not converted.
    """
    try:
        return _load(data, check_size)
    except UndecodableImage:
        plain = _without_metadata(data)
        if plain is None:
            raise
        return _load(plain, check_size)


def image_size(source: Path | bytes) -> tuple[int, int]:
    """Returns (height, width) from the header of an image file or its bytes. Raises UndecodableImage, or OSError if it cannot be read."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            return image.height, image.width
    except Exception:  # load_image retries without metadata, and raises UndecodableImage if that fails too
        image = load_image(source if isinstance(source, bytes) else source.read_bytes())
        return image.height, image.width


def as_rgb(image: Image.Image, *, limits: PixelRange | None = None) -> Image.Image:
    """Returns a decoded image converted to RGB: alpha is dropped, and wider ranges than 8 bits are scaled to 8.

    limits: the image's `pixel_range`, if it is known already.

    Pillow alone would clip 16-bit values to 255, and would treat every CMYK JPEG as inverted, although only Adobe's are.
    """
    if has_wide_pixels(image):
        return Image.fromarray(_as_8_bits(np.asarray(image), limits or pixel_range(image))).convert("RGB")
    # Pillow has inverted it (Adobe stores CMYK inverted): undo that where Adobe's marker is missing.
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        image = ImageChops.invert(image)
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise UndecodableImage("does not decode", str(error)) from error


def has_wide_pixels(image: Image.Image) -> bool:
    """Returns True if the pixels are gray integers of more than 8 bits, or floats."""
    return image.mode.startswith("I") or image.mode == "F"


def pixel_range(image: Image.Image) -> PixelRange:
    """Returns the values of black and white in an image for which `has_wide_pixels` is true.

    A TIFF may state them. Otherwise black is 0 and white the smallest of 255, 4095, 65535 (for floats also 1) that no value exceeds; if
    values are negative or larger still, black and white are the image's own minimum and maximum. So neither a 12-bit picture in a 16-bit
    file nor floats from 0 to 1 come out black.
    """
    if stated := _stated_range(image):
        return stated
    if image.format == "PPM":  # Pillow has scaled it from the maximum in its header to 16 bits
        return PixelRange(0.0, 65535.0, True)
    values = np.asarray(image)
    if image.mode == "F":
        values = values[np.isfinite(values)]
    if not values.size:
        raise UndecodableImage("does not decode", "no pixel is a number")
    low, high = float(values.min()), float(values.max())
    for white in (*((1.0,) if image.mode == "F" else ()), *_COMMON_MAXIMA):
        if low >= 0 and high <= white:
            return PixelRange(0.0, float(white), image.mode != "F" and white == _COMMON_MAXIMA[-1])
    return PixelRange(low, high, False)


def _stated_range(image: Image.Image) -> PixelRange | None:
    tags: Any = getattr(image, "tag_v2", {})
    try:
        for black, white in _TIFF_RANGES:
            if black in tags and white in tags:
                low, high = (float(np.atleast_1d(tags[tag])[0]) for tag in (black, white))
                if math.isfinite(low) and math.isfinite(high) and low < high:
                    return PixelRange(low, high, True)
        bits = int(np.atleast_1d(tags.get(_TIFF_BITS, 16))[0])
    except Exception:  # tags of an unexpected type, or unreadable: ignore them
        return None
    return PixelRange(0.0, float(2**bits - 1), True) if image.mode != "F" and 8 < bits < 16 else None


def _as_8_bits(values: NDArray[Any], limits: PixelRange) -> NDArray[np.uint8]:
    """Maps the range from black to white to 0..255. Integers keep their upper bits: 16-bit values become value >> 8."""
    black, white = limits.black, limits.white
    levels = np.empty(values.size, dtype=np.uint8)
    for first in range(0, values.size, _PIXELS_AT_A_TIME):  # an image of the largest size would fill gigabytes as int64
        some = values.reshape(-1)[first : first + _PIXELS_AT_A_TIME]
        if values.dtype.kind in "iu":
            span = int(white) - int(black) + 1
            scaled = (some.astype(np.int64) - int(black)) * 256 // span
        else:
            with np.errstate(all="ignore"):  # floats may be NaN or infinite
                share = (some.astype(np.float64) - black) / (white - black or 1.0)
            scaled = np.rint(255 * np.nan_to_num(share, nan=0.0, posinf=1.0, neginf=0.0))
        levels[first : first + len(some)] = scaled.clip(0, 255)
    return levels.reshape(values.shape)


def _load(data: bytes, check_size: Callable[[int, int], None] | None) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if check_size is not None:
            check_size(image.width, image.height)
        if image.format in ("JPEG", "MPO") and (complaint := scans_complaint(read_jpeg_header(data))):
            raise UndecodableImage("too many scans", complaint)
        image.load()
        return image
    except (UndecodableImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UndecodableImage("not an image", f"not an image: it begins with {data[:12]!r}" if data else "the file is empty") from None
    except Image.DecompressionBombError as error:
        raise UndecodableImage("too many pixels", str(error)) from error
    except Exception as error:  # of any kind, see the module's docstring
        text = " ".join(str(error).split()) or type(error).__name__
        raise UndecodableImage("truncated" if "truncated" in text.lower() else "does not decode", text) from error


def _without_metadata(data: bytes) -> bytes | None:
    """Returns a JPEG or PNG with only the parts that affect its pixels; None for another format, or if there is nothing to remove."""
    if data.startswith(b"\xff\xd8"):
        plain = without_metadata(data)
    elif data.startswith(_PNG_MAGIC):
        kept, at = [_PNG_MAGIC], len(_PNG_MAGIC)
        while at + 12 <= len(data):
            end = at + 12 + int.from_bytes(data[at : at + 4])
            if data[at + 4 : at + 8] in _PNG_PIXEL_CHUNKS:
                kept.append(data[at:end])
            at = end
        plain = b"".join(kept)
    else:
        return None
    return plain if len(plain) < len(data) else None
