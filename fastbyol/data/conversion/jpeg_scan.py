"""Quick check that a JPEG is complete: walks through its Huffman codes to the last one without decoding any pixels.

The bits of a coefficient's value need not be decoded to find the next code, and one table look-up skips several short codes. This takes 0.6 of
the time of TurboJPEG's check. It only knows well-formed baseline JPEGs without restart markers; all others are left to TurboJPEG.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbyol.data.conversion.jpeg_scan_kernel import LONGEST_CODE, walk
from fastbyol.data.formats.jpeg_header import MAX_SIDE_PX

_BASELINE, _TABLES, _QUANTIZATION, _RESTARTS, _SCAN, _COMMENT = 0xC0, 0xC4, 0xDB, 0xDD, 0xDA, 0xFE
_JFIF, _ADOBE, _APPLICATION = 0xE0, 0xEE, range(0xE0, 0xF0)
_BLOCKS_IN_UNIT = 10  # at most, in an interleaved scan


class _Table(NamedTuple):
    """A Huffman table as stored in a JPEG."""

    counts: bytes
    """Number of codes of each length, 1 to 16 bits."""
    symbols: bytes


class _Layout(NamedTuple):
    """Structure of a scan."""

    units: int
    """Number of minimum coded units (MCUs), each of which consists of `blocks`."""
    blocks: NDArray[np.uint64]
    """(blocks, 2): positions in `tables` of each block's DC and AC table."""
    tables: dict[int, _Table]
    """The used tables by class << 4 | number, where the class is 0 for DC and 1 for AC."""


class _Doubt(Exception):
    """Raised for a JPEG that is damaged or of a kind that this check does not know."""


def is_whole(jpeg: bytes) -> bool:
    """Returns True if a decoder will read the file to its end without a warning, False if unsure: then the decoder must check."""
    try:
        begin, layout = _read_header(jpeg)
    except (_Doubt, IndexError, KeyError):
        return False
    if jpeg[-2:] != b"\xff\xd9":
        return False
    data = np.frombuffer(jpeg, dtype=np.uint8)
    return bool(walk(data, begin, len(data) - 2, layout.units, layout.blocks, *_as_arrays(layout.tables)))


def _read_header(jpeg: bytes) -> tuple[int, _Layout]:
    """Returns the offset of the scan's data and its layout. Raises _Doubt, IndexError or KeyError if the header is unusual or damaged."""
    quantization: set[int] = set()
    tables: dict[int, _Table] = {}
    frame = b""
    at = 2
    while True:
        mark, marker = jpeg[at], jpeg[at + 1]
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4])
        content = jpeg[at + 4 : end]
        if mark != 0xFF or end > len(jpeg):
            raise _Doubt
        at = end
        if marker == _SCAN:
            return at, _read_scan(content, frame, quantization, tables)
        if marker == _QUANTIZATION:
            quantization.update(_read_quantization(content))
        elif marker == _TABLES:
            tables.update(_read_tables(content))
        elif marker == _BASELINE and not frame:
            frame = content
        elif not _is_harmless(marker, content):
            raise _Doubt


def _is_harmless(marker: int, content: bytes) -> bool:
    """Returns True if no decoder warns about this segment."""
    if marker == _RESTARTS:
        return content == b"\0\0"
    if marker == _JFIF and content[:5] == b"JFIF\0":
        return len(content) >= 14 and content[5] == 1
    if marker == _ADOBE and content[:5] == b"Adobe":
        return len(content) >= 12 and content[11] in (0, 1)
    return marker == _COMMENT or marker in _APPLICATION


def _read_quantization(content: bytes) -> set[int]:
    if not content or len(content) % 65 or any(head > 3 for head in content[::65]):  # 8-bit entries, tables 0 to 3
        raise _Doubt
    return set(content[::65])


def _read_tables(content: bytes) -> dict[int, _Table]:
    """Returns the Huffman tables of a segment by class << 4 | number, as stored; the class is 0 for DC and 1 for AC."""
    found: dict[int, _Table] = {}
    while content:
        counts = content[1 : LONGEST_CODE + 1]
        end = LONGEST_CODE + 1 + sum(counts)
        # 0xEC: the bits of the table's class and number that must be zero in baseline (class 0 or 1, number 0 to 3).
        if len(counts) < LONGEST_CODE or end > min(len(content), LONGEST_CODE + 1 + 256) or content[0] & 0xEC:
            raise _Doubt
        found[content[0]] = _Table(counts, content[LONGEST_CODE + 1 : end])
        content = content[end:]
    return found


def _read_scan(content: bytes, frame: bytes, quantization: set[int], tables: dict[int, _Table]) -> _Layout:
    """Returns the layout of the scan. Raises _Doubt, or KeyError if a Huffman table is missing."""
    count = frame[5]
    if count not in (1, 3) or frame[0] != 8 or len(frame) != 6 + 3 * count:
        raise _Doubt
    # The last three bytes of a baseline scan: coefficients 0 to 63, no successive approximation.
    if content[0] != count or len(content) != 4 + 2 * count or content[-3:] != b"\0\x3f\0":
        raise _Doubt
    components = [frame[at : at + 3] for at in range(6, len(frame), 3)]
    chosen = [content[at : at + 2] for at in range(1, len(content) - 3, 2)]
    names = [name for name, _, _ in components]
    if len(set(names)) < count or names != [name for name, _ in chosen]:
        raise _Doubt
    if any(number not in quantization for _, _, number in components):
        raise _Doubt
    factors = [(factor >> 4, factor & 15) for _, factor, _ in components]
    if any(not (1 <= x <= 4 and 1 <= y <= 4) for x, y in factors):
        raise _Doubt
    if len(factors) == 1:  # with one component, each MCU is a single block, whatever the sampling factors (ITU T.81, A.2.2)
        factors = [(1, 1)]
    wide, high = max(x for x, _ in factors), max(y for _, y in factors)
    if any(wide % x or high % y for x, y in factors):
        raise _Doubt
    height, width = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
    if not (0 < height <= MAX_SIDE_PX and 0 < width <= MAX_SIDE_PX):
        raise _Doubt
    pairs = [(number >> 4, 0x10 | number & 15) for _, number in chosen]
    used = {kind: tables[kind] for pair in pairs for kind in pair}
    places = {kind: place for place, kind in enumerate(used)}
    blocks = [(places[dc], places[ac]) for (x, y), (dc, ac) in zip(factors, pairs, strict=True) for _ in range(x * y)]
    if len(blocks) > _BLOCKS_IN_UNIT:
        raise _Doubt
    return _Layout(-(-width // (8 * wide)) * -(-height // (8 * high)), np.array(blocks, dtype=np.uint64), used)


def _as_arrays(tables: dict[int, _Table]) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """Returns the tables as arrays: (tables,) True for DC; (tables, 17) number of codes of each length; (tables, 256) symbols."""
    is_dc = np.array([kind < 0x10 for kind in tables])
    counts = np.zeros((len(tables), LONGEST_CODE + 1), dtype=np.int64)
    symbols = np.zeros((len(tables), 256), dtype=np.int64)
    for number, table in enumerate(tables.values()):
        counts[number, 1:] = list(table.counts)
        symbols[number, : len(table.symbols)] = list(table.symbols)
    return is_dc, counts, symbols
