"""Checks and encodes an image for both output formats: reads it completely, then keeps its bytes, transcodes it, or drops it with a reason.

- JPEG, baseline or progressive, gray or three colours, with any file name: its bytes are kept.
- CMYK, YCCK and other JPEGs; PNG, WebP, BMP, GIF, TIFF, PPM, JPEG 2000, AVIF: transcoded to RGB JPEG. Alpha is dropped, more than 8 bits are
  scaled to 8 (`pillow_decoding.pixel_range`), and only the first of several frames is kept.
- EXIF orientation: ignored and noted, as in the paper's code and ImageNet's loaders, or applied on request. ICC profiles: ignored, counted.
- Empty, unreadable, truncated or non-image files, sides over 65,500 px, more pixels or scans than allowed (checked in the header): dropped.
- A JPEG that decoders warn about but decode (stray bytes; ImageNet has some): kept and noted. A data segment that ends too early is
  dropped: part of the picture is missing.

This module runs in worker processes, so it imports nothing heavy. JPEGs are checked by libffcv's TurboJPEG, which reads every coefficient but
renders an eighth of the size in gray; that finds everything that a full decode finds. In a long conversion it only checks the JPEGs of
which `jpeg_scan` is unsure. If libffcv is not installed, Pillow decodes every JPEG.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from dataclasses import dataclass
from enum import IntEnum

from PIL import Image

from fastbyol.config.errors import Lost, UserError, require, require_at_least, require_choice, require_positive, shortened
from fastbyol.data.formats.beton import JPEG_MODE, RAW_MODE
from fastbyol.data.formats.jpeg_header import MAX_SIDE_PX, JpegHeader, exif_orientation, read_jpeg_header, scans_complaint
from fastbyol.data.formats.pillow_decoding import MAX_DECODED_PIXELS, UndecodableImage, as_rgb, has_wide_pixels, load_image, pixel_range
from fastbyol.data.formats.turbojpeg import TurboJpeg
from fastbyol.data.inputs.listing import ImageLocation

MAX_PIXELS = 100_000_000
"""Default of --max-pixels; ImageNet's largest image has 61 million."""
MAX_CPU_S = 60.0
"""Default of --max-seconds; the largest image that is allowed by default takes about 3 s."""
UNREADABLE = "unreadable"
"""Reason for dropping a file that the operating system cannot read."""
UNREACHABLE = "in a store that does not answer"
"""Reason that ends the conversion, which can go on once the store is back."""
EXIF_MODES = ("ignore", "apply")
_CUT_SHORT = ("Premature end of JPEG file", "Corrupt JPEG data: premature end of data segment")
_MANY_IMAGES = 1_000
"""After this many JPEGs, a process loads `jpeg_scan`, which takes half a second and then saves 0.3 ms per image."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Notes = tuple[tuple[str, str], ...]
"""(kind, detail) of oddities that do not change how the image is stored."""


class Outcome(IntEnum):
    """Outcome of an image's conversion."""

    DROPPED = 0
    PASSED = 1
    """Stored byte for byte."""
    TRANSCODED = 2
    """Encoded as JPEG, because its format or orientation required it."""
    RESIZED = 3
    """Resized, because its longer side exceeded the maximum."""
    RAW = 4
    """Stored as pixels, because of `raw_fraction`."""


@dataclass(frozen=True)
class EncodeSettings:
    """Settings of how images are stored; the same settings give the same bytes."""

    max_side_px: int | None = None
    """Largest length of the longer side: larger images are shrunk, antialiased bicubic. None keeps every size."""
    quality: int = 95
    """JPEG quality of transcoded and resized images."""
    exif: str = "ignore"
    """'ignore' the EXIF orientation, or 'apply' it by rotating the pixels."""
    max_pixels: int = MAX_PIXELS
    max_cpu_s: float = MAX_CPU_S
    """Largest CPU time per image; an image that takes longer is dropped. Waiting for a disk does not count."""
    raw_fraction: float = 0.0
    """Share of images stored as pixels (.beton only)."""
    max_stored_bytes: int | None = None
    """Largest stored size that the output allows. A raw image that exceeds it is stored as JPEG; a JPEG that exceeds it is dropped."""

    def __post_init__(self) -> None:
        if self.max_side_px is not None:
            require(1 <= self.max_side_px <= MAX_SIDE_PX, "max-side", self.max_side_px, f"in [1, {MAX_SIDE_PX:,}]")
        require(1 <= self.quality <= 100, "quality", self.quality, "in [1, 100]")
        require_choice("exif", self.exif, EXIF_MODES)
        require_at_least("max-pixels", self.max_pixels, 1)
        require_positive("max-seconds", self.max_cpu_s)
        require(0.0 <= self.raw_fraction <= 1.0, "raw-fraction", self.raw_fraction, "in [0, 1]")

    def as_plain(self) -> dict[str, int | str | float]:
        """Returns the settings as plain values for the manifest; optional ones only if they are used."""
        checked_by = "TurboJPEG" if find_turbojpeg() else "Pillow"
        optional = {"max_side_px": self.max_side_px, "raw_fraction": self.raw_fraction}
        plain = {"transcode_quality": self.quality, "exif": self.exif, "max_pixels": self.max_pixels, "checked_by": checked_by}
        return plain | {name: value for name, value in optional.items() if value}


@dataclass(frozen=True)
class EncodedImage:
    """An image as it will be stored: a JPEG that every backend can decode, or its pixels."""

    data: bytes
    height: int
    width: int
    mode: int
    """JPEG_MODE or RAW_MODE."""
    crc32: int
    outcome: Outcome
    source_bytes: int
    reason: str = ""
    """Reason for transcoding it, else ''."""
    notes: Notes = ()
    has_icc: bool = False


@dataclass(frozen=True)
class DroppedImage:
    """An image that cannot be kept."""

    reason: str
    """One of a few fixed phrases."""
    detail: str
    source_bytes: int = 0


def read_original(location: ImageLocation) -> bytes | DroppedImage:
    """Returns an image's bytes, or why there are none."""
    try:
        return location.read()
    except Lost as error:
        return DroppedImage(UNREACHABLE, str(error))
    except OSError as error:
        return DroppedImage(UNREADABLE, error.strerror or shortened(error))


class Encoder:
    """Checks and encodes images with fixed settings, within one process."""

    def __init__(self, settings: EncodeSettings) -> None:
        self._settings = settings
        self._turbo = find_turbojpeg()
        self._checked = 0

    def encode_from(self, location: ImageLocation, *, index: int) -> EncodedImage | DroppedImage:
        """Reads and encodes an image. index: its position in the listing, which decides if it is stored raw."""
        data = read_original(location)
        return data if isinstance(data, DroppedImage) else self.encode(data, index=index)

    def encode(self, data: bytes, *, index: int = 0) -> EncodedImage | DroppedImage:
        """Encodes an image from its bytes. index: as for `encode_from`. Damaged data never raises an exception: the result is then a DroppedImage."""
        try:
            return self._encode(data, index)
        except UndecodableImage as error:
            return DroppedImage(error.reason, shortened(error), len(data))
        except MemoryError:
            return DroppedImage("too large", "not enough memory to decode it", len(data))
        except Exception as error:  # on damaged data, image readers raise exceptions of any kind
            return DroppedImage("does not decode", shortened(f"{type(error).__name__}: {error}"), len(data))

    def _encode(self, data: bytes, index: int) -> EncodedImage:
        if not data:
            raise UndecodableImage("empty", "the file has no bytes")
        header = read_jpeg_header(data)
        if header is None or not header.is_common:
            return self._render(data, header, index)
        self._check_size(header.width, header.height)
        if too_many := scans_complaint(header):
            raise UndecodableImage("too many scans", too_many)
        complaint, fatal = self._complaint(data, header)
        if fatal:
            return self._render(data, header, index, reason=f"TurboJPEG refuses it: {complaint}")
        notes: Notes = (("decoder warned", complaint),) if complaint else ()
        if self._turbo is None or self._must_render(header, index):
            return self._render(data, header, index, notes=notes)
        return self._passed(data, header, notes)

    def _complaint(self, data: bytes, header: JpegHeader) -> tuple[str, bool]:
        """Returns TurboJPEG's message ('' if none) and True if it is fatal. Raises UndecodableImage for a truncated JPEG."""
        if self._turbo is None:
            return "", False
        self._checked += 1
        if self._checked > _MANY_IMAGES:
            from fastbyol.data.conversion.jpeg_scan import is_whole

            if is_whole(data):
                return "", False
        complaint, fatal = self._turbo.check(data, height=header.height, width=header.width)
        if complaint in _CUT_SHORT:
            raise UndecodableImage("truncated", complaint)
        return complaint, fatal

    def _must_render(self, header: JpegHeader, index: int) -> bool:
        settings = self._settings
        turned = settings.exif == "apply" and header.orientation != 1
        too_long = settings.max_side_px is not None and max(header.width, header.height) > settings.max_side_px
        return turned or too_long or self._goes_raw(index, header.height, header.width)

    def _passed(self, data: bytes, header: JpegHeader, notes: Notes) -> EncodedImage:
        notes += _exif_note(header.orientation)
        image = EncodedImage(
            data, header.height, header.width, JPEG_MODE, zlib.crc32(data), Outcome.PASSED, len(data), "", notes, header.has_icc
        )
        return self._fitting(image)

    def _render(self, data: bytes, header: JpegHeader | None, index: int, *, reason: str = "", notes: Notes = ()) -> EncodedImage:
        """Decodes with Pillow, resizes if necessary, and stores JPEG or pixels: for all but common JPEGs, and for those that must be changed."""
        image = load_image(data, check_size=self._check_size)
        reason = reason or _oddity(image, header)
        # A common JPEG that only had to be checked, because there is no TurboJPEG.
        if header is not None and not reason and not self._must_render(header, index):
            return self._passed(data, header, notes)
        # Pillow's TIFF reader applies the orientation itself, and then reports the image as upright.
        orientation = header.orientation if header else exif_orientation(image)
        limits = pixel_range(image) if has_wide_pixels(image) else None
        if limits is not None and not limits.stated:
            notes += (("range of its pixel values guessed", f"{limits.black:g} to {limits.white:g}"),)
        pixels = as_rgb(image, limits=limits)
        if orientation != 1 and self._settings.exif == "apply":
            pixels, reason = pixels.transpose(TURNS[orientation]), reason or "EXIF orientation applied"
        else:
            notes += _exif_note(orientation)
        limit, longer = self._settings.max_side_px, max(pixels.size)
        if limit is not None and longer > limit:
            width, height = (max(1, round(side * limit / longer)) for side in pixels.size)
            pixels = pixels.resize((width, height), Image.Resampling.BICUBIC)
        width, height = pixels.size
        if max(pixels.size) > MAX_SIDE_PX:
            raise UndecodableImage("too large", f"{width}x{height} pixels; a side may have at most {MAX_SIDE_PX:,}")
        if self._goes_raw(index, height, width):
            stored, mode, outcome = pixels.tobytes(), RAW_MODE, Outcome.RAW
        else:
            if len(pixels.info.get("comment", b"")) > MAX_SIDE_PX:  # Pillow would copy it into the JPEG, whose segments are limited
                del pixels.info["comment"]
            buffer = io.BytesIO()
            pixels.save(buffer, "JPEG", quality=self._settings.quality)
            stored, mode, outcome = buffer.getvalue(), JPEG_MODE, Outcome.RESIZED
        outcome, has_icc = Outcome.TRANSCODED if reason else outcome, "icc_profile" in image.info
        return self._fitting(EncodedImage(stored, height, width, mode, zlib.crc32(stored), outcome, len(data), reason, notes, has_icc))

    def _fitting(self, image: EncodedImage) -> EncodedImage:
        """Returns the image if a file can hold it and training can decode it."""
        limit = self._settings.max_stored_bytes
        if limit is not None and len(image.data) > limit:
            raise UndecodableImage("too large", f"{len(image.data):,} bytes; a page of the file holds {limit:,}")
        if image.height * image.width > MAX_DECODED_PIXELS:
            size = f"{image.width}x{image.height}"
            raise UndecodableImage(
                "too many pixels", f"{size}; training decodes {MAX_DECODED_PIXELS:,} at most, --max-side makes it smaller"
            )
        return image

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self._settings.max_pixels:
            raise UndecodableImage("too many pixels", f"{width}x{height}; --max-pixels allows {self._settings.max_pixels:,}")
        if max(width, height) > MAX_SIDE_PX and self._settings.max_side_px is None:
            raise UndecodableImage("too large", f"{width}x{height} pixels; a side may have at most {MAX_SIDE_PX:,}")

    def _goes_raw(self, index: int, height: int, width: int) -> bool:
        """Returns True if the image is stored raw: the same pseudo-random choice in every run; False if it would not fit."""
        settings = self._settings
        if not settings.raw_fraction or (settings.max_stored_bytes is not None and 3 * height * width > settings.max_stored_bytes):
            return False
        word = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8, person=b"raw").digest()
        return int.from_bytes(word, "little") < settings.raw_fraction * 2**64


def find_turbojpeg() -> TurboJpeg | None:
    """Returns libffcv's TurboJPEG, or None if ffcv is not installed."""
    try:
        return TurboJpeg()
    except UserError:
        return None


def _oddity(image: Image.Image, header: JpegHeader | None) -> str:
    """Returns why an image cannot be stored byte for byte, as a short phrase that many images share, or '' for a common JPEG."""
    if header is not None:
        if header.is_common:
            return ""
        if header.components == 4:
            return "YCCK JPEG" if header.adobe_transform == 2 else "CMYK JPEG"
        return f"JPEG of a rare kind (frame 0x{header.frame:02X}, {header.bits} bits, {header.components} components)"
    kinds = {"1": "bilevel", "P": "palette", "L": "gray", "RGBA": "with alpha", "LA": "with alpha", "PA": "with alpha"}
    kinds |= {"I": "16-bit" if image.format in ("PNG", "PPM") else "of integers", "F": "of floats"}
    kind = "16-bit" if image.mode.startswith("I;16") else kinds.get(image.mode, "")
    return f"{image.format or 'unknown format'} {kind}".strip()


def _exif_note(orientation: int) -> tuple[tuple[str, str], ...]:
    return (("EXIF orientation ignored", str(orientation)),) if orientation != 1 else ()
