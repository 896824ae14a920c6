"""One validation step for both formats: every image is really read to its end, then kept as it is, transcoded, or dropped with a reason.

What happens to each oddity:

- JPEG, baseline or progressive, gray or three colours, whatever its file is called: its own bytes.
- CMYK, YCCK and other JPEGs; PNG, WebP, BMP, GIF, TIFF, PPM, JPEG 2000, AVIF: transcoded to RGB JPEG. Alpha is left out, more than 8 bits are
  scaled to 8 (`pillow_decoding.pixel_range`), of several pictures the first is kept.
- EXIF orientation: ignored and noted, as in the paper's code and ImageNet's loaders, or applied if asked for. ICC profiles: ignored, counted.
- Empty, unreadable, truncated or foreign files, sides over 65,500 px, more pixels or scans than allowed (decided from the header): dropped.
- A JPEG that decoders complain about but render (stray bytes; ImageNet has some): kept and noted. A data segment that ends too early is not
  such a case: part of the picture is missing.

Runs in worker processes, so this module imports nothing heavy. Where libffcv is installed its TurboJPEG reads the JPEGs: every coefficient,
rendered at an eighth of the size and in gray, which finds whatever a full decode finds. In a long conversion it is asked only about those of
which `jpeg_scan` is not sure. Where libffcv is not installed, Pillow decodes them.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

from PIL import Image

from fastbyol.config.errors import UserError, require, require_at_least, require_choice, require_positive
from fastbyol.data.beton import JPEG_MODE, RAW_MODE
from fastbyol.data.ffcv_loader import TurboJpeg
from fastbyol.data.jpeg_header import MAX_SIDE_PX, JpegHeader, exif_orientation, read_jpeg_header, scans_complaint
from fastbyol.data.pillow_decoding import MAX_DECODED_PIXELS, UndecodableImage, as_rgb, has_wide_pixels, load_image, pixel_range

MAX_PIXELS = 100_000_000
"""ImageNet's largest image has 61 million."""
MAX_CPU_S = 60.0
"""The largest image that is allowed takes about 3 s."""
UNREADABLE = "unreadable"
"""The reason of files that the system would not read."""
EXIF_MODES = ("ignore", "apply")
_CUT_SHORT = ("Premature end of JPEG file", "Corrupt JPEG data: premature end of data segment")
_DETAIL_CHARACTERS = 200
_MANY_IMAGES = 1_000
"""So many JPEGs later a process loads `jpeg_scan`: it takes half a second, and saves 0.3 ms an image."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


Notes = tuple[tuple[str, str], ...]
"""(what, detail) of oddities that were left alone."""


class Outcome(IntEnum):
    """What became of an image."""

    DROPPED = 0
    PASSED = 1
    """Its own bytes."""
    TRANSCODED = 2
    """For an oddity."""
    RESIZED = 3
    """Because its longer side passed the maximum."""
    RAW = 4
    """Stored as pixels, because that was asked for."""


@dataclass(frozen=True)
class EncodeSettings:
    """How images are stored; the same settings give the same bytes."""

    max_side_px: int | None = None
    """The longer side is made no longer than this, antialiased bicubic; smaller images are left alone. None: any size."""
    quality: int = 95
    """Of the JPEGs that are made here."""
    exif: str = "ignore"
    """'ignore' the orientation, or 'apply' it: turn the pixels."""
    max_pixels: int = MAX_PIXELS
    max_cpu_s: float = MAX_CPU_S
    """An image on which a worker computes for longer is dropped. Waiting for a disk does not count."""
    raw_fraction: float = 0.0
    """Share of images stored as pixels (.beton only)."""
    max_stored_bytes: int | None = None
    """An image that takes more does not fit into the output; raw ones are then stored as JPEG."""

    def __post_init__(self) -> None:
        if self.max_side_px is not None:
            require(1 <= self.max_side_px <= MAX_SIDE_PX, "max-side", self.max_side_px, f"in [1, {MAX_SIDE_PX:,}]")
        require(1 <= self.quality <= 100, "quality", self.quality, "in [1, 100]")
        require_choice("exif", self.exif, EXIF_MODES)
        require_at_least("max-pixels", self.max_pixels, 1)
        require_positive("max-seconds", self.max_cpu_s)
        require(0.0 <= self.raw_fraction <= 1.0, "raw-fraction", self.raw_fraction, "in [0, 1]")


@dataclass(frozen=True)
class EncodedImage:
    """An image as it will be stored: a JPEG that every backend decodes, or its pixels."""

    data: bytes
    height: int
    width: int
    mode: int
    """JPEG_MODE or RAW_MODE."""
    crc32: int
    outcome: Outcome
    source_bytes: int
    reason: str = ""
    """Why it was transcoded."""
    notes: Notes = ()
    has_icc: bool = False


@dataclass(frozen=True)
class DroppedImage:
    """An image that cannot be kept."""

    reason: str
    """One of a few."""
    detail: str
    source_bytes: int = 0


class Location(Protocol):
    """Where an image's bytes come from."""

    @property
    def name(self) -> str: ...
    def read(self) -> bytes: ...


class _About(NamedTuple):
    """The last fields of an `EncodedImage`."""

    source_bytes: int
    reason: str
    notes: Notes
    has_icc: bool


class Encoder:
    """The validation step with its settings, for one process."""

    def __init__(self, settings: EncodeSettings) -> None:
        self._settings = settings
        self._turbo = find_turbojpeg()
        self._checked = 0

    def encode_from(self, location: Location, *, index: int) -> EncodedImage | DroppedImage:
        """Reads and encodes; index: the image's number in its listing, which decides whether it is stored raw."""
        try:
            data = location.read()
        except OSError as error:
            return DroppedImage(UNREADABLE, error.strerror or _shortened(error))
        return self.encode(data, index=index)

    def encode(self, data: bytes, *, index: int = 0) -> EncodedImage | DroppedImage:
        """Never raises for what is in the data."""
        try:
            return self._encode(data, index)
        except UndecodableImage as error:
            return DroppedImage(error.reason, _shortened(error), len(data))
        except MemoryError:
            return DroppedImage("too large", "not enough memory to decode it", len(data))
        except Exception as error:  # whatever a reader of images stumbles over
            return DroppedImage("does not decode", _shortened(f"{type(error).__name__}: {error}"), len(data))

    def _encode(self, data: bytes, index: int) -> EncodedImage:
        if not data:
            raise UndecodableImage("empty", "the file has no bytes")
        header = read_jpeg_header(data)
        if header is None or not header.is_common:
            return self._render(data, header, index)
        self._check_size(header.width, header.height)
        if too_many := scans_complaint(data):
            raise UndecodableImage("too many scans", too_many)
        complaint, fatal = self._complaint(data, header)
        if fatal:
            return self._render(data, header, index, reason=f"TurboJPEG refuses it: {complaint}")
        notes: Notes = (("decoder warned", complaint),) if complaint else ()
        if self._turbo is None or self._must_render(header, index):
            return self._render(data, header, index, notes=notes)
        return self._passed(data, header, notes)

    def _complaint(self, data: bytes, header: JpegHeader) -> tuple[str, bool]:
        """TurboJPEG's, and whether it was fatal."""
        if self._turbo is None or self._is_beyond_doubt(data):
            return "", False
        complaint, fatal = self._turbo.check(data, height=header.height, width=header.width)
        if complaint in _CUT_SHORT:
            raise UndecodableImage("truncated", complaint)
        return complaint, fatal

    def _is_beyond_doubt(self, data: bytes) -> bool:
        """Whether TurboJPEG need not be asked."""
        self._checked += 1
        if self._checked <= _MANY_IMAGES:
            return False
        from fastbyol.data.conversion.jpeg_scan import is_whole

        return is_whole(data)

    def _must_render(self, header: JpegHeader, index: int) -> bool:
        settings = self._settings
        turned = settings.exif == "apply" and header.orientation != 1
        too_long = settings.max_side_px is not None and max(header.width, header.height) > settings.max_side_px
        return turned or too_long or self._goes_raw(index, header.height, header.width)

    def _passed(self, data: bytes, header: JpegHeader, notes: Notes) -> EncodedImage:
        about = _About(len(data), "", notes + _exif_note(header.orientation), header.has_icc)
        return self._stored(data, header.height, header.width, JPEG_MODE, Outcome.PASSED, about)

    def _render(self, data: bytes, header: JpegHeader | None, index: int, *, reason: str = "", notes: Notes = ()) -> EncodedImage:
        """By Pillow: whatever is no plain JPEG, and plain ones that are to be changed."""
        image = load_image(data, check_size=self._check_size)
        reason = reason or _oddity(image, header)
        if header is not None and not reason and not self._must_render(header, index):  # a plain JPEG, and no TurboJPEG here
            return self._passed(data, header, notes)
        # Pillow's reader of TIFF turns the pixels itself, and then says that they are upright.
        orientation = header.orientation if header else exif_orientation(image)
        if has_wide_pixels(image) and not (limits := pixel_range(image)).stated:
            notes += (("range of its pixel values guessed", f"{limits.black:g} to {limits.white:g}"),)
        pixels = as_rgb(image)
        if orientation != 1 and self._settings.exif == "apply":
            pixels, reason = pixels.transpose(_TURNS[orientation]), reason or "EXIF orientation applied"
        else:
            notes += _exif_note(orientation)
        return self._made(pixels, index, _About(len(data), reason, notes, "icc_profile" in image.info))

    def _made(self, image: Image.Image, index: int, about: _About) -> EncodedImage:
        """The pixels resized if they must be, and stored raw or as JPEG."""
        image = self._resized(image)
        if max(image.size) > MAX_SIDE_PX:
            raise UndecodableImage("too large", f"{image.width}x{image.height} pixels; a side ends at {MAX_SIDE_PX:,}")
        if self._goes_raw(index, image.height, image.width):
            outcome = Outcome.TRANSCODED if about.reason else Outcome.RAW
            return self._stored(image.tobytes(), image.height, image.width, RAW_MODE, outcome, about)
        if len(image.info.get("comment", b"")) > MAX_SIDE_PX:  # Pillow writes it into the JPEG, whose segments hold no more
            del image.info["comment"]
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=self._settings.quality)
        outcome = Outcome.TRANSCODED if about.reason else Outcome.RESIZED
        return self._stored(buffer.getvalue(), image.height, image.width, JPEG_MODE, outcome, about)

    def _stored(self, data: bytes, height: int, width: int, mode: int, outcome: Outcome, about: _About) -> EncodedImage:
        limit = self._settings.max_stored_bytes
        if limit is not None and len(data) > limit:
            raise UndecodableImage("too large", f"{len(data):,} bytes; a page of the file holds {limit:,}")
        if height * width > MAX_DECODED_PIXELS:
            raise UndecodableImage(
                "too many pixels", f"{width}x{height}; training decodes {MAX_DECODED_PIXELS:,} at most, --max-side makes it smaller"
            )
        return EncodedImage(data, height, width, mode, zlib.crc32(data), outcome, *about)

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self._settings.max_pixels:
            raise UndecodableImage("too many pixels", f"{width}x{height}; --max-pixels allows {self._settings.max_pixels:,}")
        if max(width, height) > MAX_SIDE_PX and self._settings.max_side_px is None:
            raise UndecodableImage("too large", f"{width}x{height} pixels; a side ends at {MAX_SIDE_PX:,}")

    def _resized(self, image: Image.Image) -> Image.Image:
        limit, longer = self._settings.max_side_px, max(image.size)
        if limit is None or longer <= limit:
            return image
        width, height = (max(1, round(side * limit / longer)) for side in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def _goes_raw(self, index: int, height: int, width: int) -> bool:
        """The same images in every run, spread evenly; none that would not fit."""
        settings = self._settings
        if not settings.raw_fraction or (settings.max_stored_bytes is not None and 3 * height * width > settings.max_stored_bytes):
            return False
        word = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8, person=b"raw").digest()
        return int.from_bytes(word, "little") < settings.raw_fraction * 2**64


def find_turbojpeg() -> TurboJpeg | None:
    """libffcv's, None where ffcv is not installed."""
    try:
        return TurboJpeg()
    except UserError:
        return None


def _oddity(image: Image.Image, header: JpegHeader | None) -> str:
    """Why an image cannot be passed through, in a few words that many images share; '' for a plain JPEG."""
    if header is not None and header.is_common:
        return ""
    if header is not None:
        if header.components == 4:
            return "YCCK JPEG" if header.adobe_transform == 2 else "CMYK JPEG"
        return f"JPEG of a rare kind (frame 0x{header.frame:02X}, {header.bits} bits, {header.components} components)"
    kinds = {"1": "bilevel", "P": "palette", "L": "gray", "RGBA": "with alpha", "LA": "with alpha", "PA": "with alpha"}
    kinds |= {"I": "16-bit" if image.format in ("PNG", "PPM") else "of integers", "F": "of floats"}
    kind = "16-bit" if image.mode.startswith("I;16") else kinds.get(image.mode, "")
    return f"{image.format or 'unknown format'} {kind}".strip()


def _exif_note(orientation: int) -> tuple[tuple[str, str], ...]:
    return (("EXIF orientation ignored", str(orientation)),) if orientation != 1 else ()


def _shortened(error: object) -> str:
    return " ".join(str(error).split())[:_DETAIL_CHARACTERS] or type(error).__name__
