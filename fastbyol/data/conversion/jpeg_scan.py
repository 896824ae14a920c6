"""Quick check that a JPEG is complete: walks through its Huffman codes to the last one without decoding any pixels.

The bits of a coefficient's value need not be decoded to find the next code, and one table look-up skips several short codes. This takes 0.6 of
the time of TurboJPEG's check. It only knows well-formed baseline JPEGs without restart markers; all others are left to TurboJPEG.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbyol.data.conversion.jpeg_scan_kernel import LONGEST_CODE, walk
from fastbyol.data.formats.jpeg_header import MAX_SIDE_PX

_BASELINE, _TABLES, _QUANTIZATION, _RESTARTS, _SCAN, _COMMENT = 0xC0, 0xC4, 0xDB, 0xDD, 0xDA, 0xFE
_JFIF, _ADOBE, _APPLICATION = 0xE0, 0xEE, range(0xE0, 0xF0)
_BLOCKS_IN_UNIT = 10  # at most, in an interleaved scan


_Tables = dict[int, tuple[bytes, bytes]]
"""Huffman tables as stored in a JPEG: number of codes of each length, 1 to 16 bits, and symbols. By class << 4 | number, class 0 is DC, 1 AC."""


class _Doubt(Exception):
    """Raised for a JPEG that is damaged or of a kind that this check does not know."""


def is_whole(jpeg: bytes) -> bool:
    """Returns True if a decoder will read the file to its end without a warning, False if unsure: then the decoder must check."""
    try:
        begin, scan = _read_header(jpeg)
    except (_Doubt, IndexError, KeyError):
        return False
    if jpeg[-2:] != b"\xff\xd9":
        return False
    data = np.frombuffer(jpeg, dtype=np.uint8)
    return bool(walk(data, begin, len(data) - 2, *scan))


def _read_header(jpeg: bytes) -> tuple[int, tuple[Any, ...]]:
    """Returns the offset of the scan's data and the result of `_read_scan`. Raises _Doubt, IndexError or KeyError if the header is unusual or damaged."""
    quantization: set[int] = set()
    tables: _Tables = {}
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
            if not content or len(content) % 65 or any(head > 3 for head in content[::65]):  # 8-bit entries, tables 0 to 3
                raise _Doubt
            quantization.update(content[::65])
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


def _read_tables(content: bytes) -> _Tables:
    found: _Tables = {}
    while content:
        counts = content[1 : LONGEST_CODE + 1]
        end = LONGEST_CODE + 1 + sum(counts)
        # 0xEC: the bits of the table's class and number that must be zero in baseline (class 0 or 1, number 0 to 3).
        if len(counts) < LONGEST_CODE or end > min(len(content), LONGEST_CODE + 1 + 256) or content[0] & 0xEC:
            raise _Doubt
        found[content[0]] = counts, content[LONGEST_CODE + 1 : end]
        content = content[end:]
    return found


def _read_scan(content: bytes, frame: bytes, quantization: set[int], tables: _Tables) -> tuple[Any, ...]:
    """Returns `walk`'s arguments from `units` on. Raises _Doubt, or KeyError if a Huffman table is missing."""
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
    counts, symbols = (np.zeros((len(used), columns), dtype=np.int64) for columns in (LONGEST_CODE + 1, 256))
    for number, (lengths, values) in enumerate(used.values()):
        counts[number, 1:] = list(lengths)
        symbols[number, : len(values)] = list(values)
    units = -(-width // (8 * wide)) * -(-height // (8 * high))
    return units, np.array(blocks, dtype=np.uint64), np.array([kind < 0x10 for kind in used]), counts, symbols
