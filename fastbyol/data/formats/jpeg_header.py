"""Reads a JPEG's header without decoding: size, kind of compression, colour, orientation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from PIL import Image

MAX_SIDE_PX = 65_500
"""libjpeg's largest height and width (a .beton could hold 65,535)."""
MAX_SCANS = 100
"""Largest number of scans that is decoded; each is a pass over all pixels. A progressive JPEG has about ten, one with separate colours
three; half a megabyte with thousands of scans takes hours."""
_STANDALONE = {0x01, *range(0xD0, 0xD9)}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_APP1, _APP2, _APP14 = 0xE1, 0xE2, 0xEE
_APPLICATION, _COMMENT = range(0xE0, 0xF0), 0xFE
_BASELINE_OR_PROGRESSIVE = {0xC0, 0xC1, 0xC2}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class JpegHeader:
    """Header fields of the first image in a JPEG file."""

    height: int
    width: int
    components: int
    bits: int
    frame: int
    """Marker of the frame: 0xC0 baseline, 0xC2 progressive, …"""
    exif: bytes = b""
    has_icc: bool = False
    scans: int = 1
    """Number of scans; counted only if decoders may read several."""
    adobe_transform: int | None = None
    """Colour transform in Adobe's marker: 0 RGB or CMYK, 1 YCbCr, 2 YCCK; None if there is no such marker."""

    @cached_property
    def orientation(self) -> int:
        """EXIF orientation: 1 is upright, 2 to 8 are mirrored or rotated."""
        return exif_orientation(self.exif) if self.exif else 1

    @property
    def is_common(self) -> bool:
        """True if every JPEG decoder can read it: baseline or progressive, 8 bits, gray or three colours."""
        return self.frame in _BASELINE_OR_PROGRESSIVE and self.bits == 8 and self.components in (1, 3)


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Returns the header, or None if the data does not begin as a JPEG or ends before its frame header."""
    if data[:2] != b"\xff\xd8":
        return None
    frame, exif, has_icc, adobe = None, b"", False, None
    marker = at = end = 0
    for marker, at, end in _segments(data):
        # Segments of the same number may belong to other programs, so each is known by its first bytes.
        if marker in _FRAMES and end - at >= 6:
            frame = frame or (int.from_bytes(data[at + 1 : at + 3]), int.from_bytes(data[at + 3 : at + 5]), data[at + 5], data[at], marker)
        elif marker == _APP1 and data[at : at + 6] == b"Exif\0\0":
            exif = data[at:end]
        elif marker == _APP2 and data[at : at + 12] == b"ICC_PROFILE\0":
            has_icc = True
        elif marker == _APP14 and data[at : at + 5] == b"Adobe" and end - at >= 12:
            adobe = data[at + 11]
    if frame is None or 0 in frame[:3]:
        return None
    scans = 1
    # Decoders read no second scan where the first one has all the colours, unless the JPEG is progressive.
    if marker == _START_OF_SCAN and at < end and (frame[4] in _PROGRESSIVE or data[at] < frame[2]):
        scans += data.count(b"\xff\xda", end)  # within the coded pixels 0xFF is always followed by a zero or a restart marker
    return JpegHeader(*frame, exif=exif, has_icc=has_icc, scans=scans, adobe_transform=adobe)


def jpeg_complaint(data: bytes, *, height: int, width: int) -> str:
    """Returns why a JPEG that should have this size must not be decoded (no JPEG, another size, too many scans), or ''."""
    header = read_jpeg_header(data)
    if header is None:
        return "it is not a JPEG, or is cut off in its header"
    if header.height != height or header.width != width:
        return f"it is {header.width}x{header.height} pixels, its table says {width}x{height}"
    return scans_complaint(header)


def scans_complaint(header: JpegHeader | None) -> str:
    """Returns 'it has N scans …' for a JPEG of more than MAX_SCANS, else ''. Scan markers inside its metadata do not count."""
    if header is None or header.scans <= MAX_SCANS:
        return ""
    return f"it has {header.scans:,} scans, more than the {MAX_SCANS} that are decoded"


def without_metadata(data: bytes) -> bytes:
    """Returns the JPEG without comments, EXIF, colour profiles and other application segments, except Adobe's, which decoding needs."""
    kept, at = [data[:2]], 2
    for marker, start, end in _segments(data):
        tells_colours = marker == _APP14 and data[start : start + 5] == b"Adobe" and end - start >= 12
        if tells_colours or not (marker in _APPLICATION or marker == _COMMENT):
            kept.append(data[start - 4 : end])
        at = end
    return b"".join([*kept, data[at:]])


def exif_orientation(exif: bytes | Image.Image) -> int:
    """Returns the orientation tag of EXIF data or of an opened image; 1 (upright) if it is missing or invalid."""
    try:
        if isinstance(exif, bytes):
            parsed = Image.Exif()
            parsed.load(exif)
        else:
            parsed = exif.getexif()
        value = parsed.get(_ORIENTATION_TAG, 1)
    except Exception:  # on damaged data, Pillow's EXIF reader raises exceptions of any kind
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields (marker, first byte, end) of every segment's content up to the first scan's header; no end lies beyond the data."""
    at = 2
    while at + 4 <= len(data):
        at = data.find(b"\xff", at)
        if at < 0 or at + 4 > len(data):
            break
        marker = data[at + 1]
        if marker in (0xFF, 0x00):  # fill bytes or stray data between segments: decoders skip them too
            at += 1
        elif marker in _STANDALONE:
            at += 2
        elif marker == _END_OF_IMAGE:
            break
        else:
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
            yield marker, at + 4, min(end, len(data))
            if marker == _START_OF_SCAN:
                break
            at = end
