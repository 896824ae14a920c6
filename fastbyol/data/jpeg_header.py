"""What a JPEG's markers say, read without decoding: size, kind, colour, orientation."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

MAX_SIDE_PX = 65_500
"""libjpeg's limit (and the .beton's, at 65,535)."""
_STANDALONE = {0x01, *range(0xD0, 0xD9)}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_APP1, _APP2, _APP14 = 0xE1, 0xE2, 0xEE
_BASELINE_OR_PROGRESSIVE = {0xC0, 0xC1, 0xC2}
_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class JpegHeader:
    """Of the first image in a JPEG file."""

    height: int
    width: int
    components: int
    bits: int
    frame: int
    """The frame's marker: 0xC0 baseline, 0xC2 progressive, …"""
    orientation: int = 1
    """EXIF: 1 upright, 2 to 8 mirrored or turned."""
    has_icc: bool = False
    adobe_transform: int | None = None
    """Of Adobe's marker: 0 RGB or CMYK, 1 YCbCr, 2 YCCK; None: there is no such marker."""

    @property
    def is_common(self) -> bool:
        """Every JPEG decoder takes it: baseline or progressive, 8 bits, gray or three colours."""
        return self.frame in _BASELINE_OR_PROGRESSIVE and self.bits == 8 and self.components in (1, 3)


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """The header; None if the data do not begin as a JPEG or end before its frame is described."""
    if data[:2] != b"\xff\xd8":
        return None
    orientation, has_icc, adobe = 1, False, None
    frame: tuple[int, ...] | None = None
    for marker, at, end in _segments(data):
        if marker == _APP1 and data[at : at + 6] == b"Exif\0\0":
            orientation = exif_orientation(data[at:end])
        elif marker == _APP2 and data[at : at + 12] == b"ICC_PROFILE\0":
            has_icc = True
        elif marker == _APP14 and data[at : at + 5] == b"Adobe" and end - at >= 12:
            adobe = data[at + 11]
        elif marker in _FRAMES and frame is None and end - at >= 6:
            frame = (int.from_bytes(data[at + 1 : at + 3]), int.from_bytes(data[at + 3 : at + 5]), data[at + 5], data[at], marker)
    if frame is None or 0 in frame[:3]:
        return None
    return JpegHeader(*frame, orientation=orientation, has_icc=has_icc, adobe_transform=adobe)


def exif_orientation(exif: bytes | Image.Exif) -> int:
    """The orientation tag, 1 (upright) where there is none that means anything."""
    if isinstance(exif, bytes):
        parsed = Image.Exif()
        try:
            parsed.load(exif)
        except Exception:  # Pillow raises whatever its reader of TIFF stumbles upon
            return 1
        exif = parsed
    value = exif.get(_ORIENTATION_TAG, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _segments(data: bytes) -> list[tuple[int, int, int]]:
    """(marker, first byte, end) of every segment's content up to the first scan."""
    found: list[tuple[int, int, int]] = []
    at = 2
    while at + 4 <= len(data):
        at = data.find(b"\xff", at)
        if at < 0 or at + 4 > len(data):
            break
        marker = data[at + 1]
        if marker in (0xFF, 0x00):  # fill bytes, or stray data between segments, which decoders pass over too
            at += 1
        elif marker in _STANDALONE:
            at += 2
        elif marker in (_START_OF_SCAN, _END_OF_IMAGE):
            break
        else:
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
            found.append((marker, at + 4, end))
            at = end
    return found
