"""Compiled loops of `jpeg_scan`: build look-up tables from a JPEG's Huffman tables, and walk through its codes with them."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbyol.host.compile_cache import njit

OPTIONS: dict[str, Any] = {"nogil": True, "cache": True}
LONGEST_CODE = 16
"""Longest Huffman code, in bits."""
_LOOK = 11  # bits of a table index; four tables of 2^11 entries fill half of a first-level cache
# A table entry: bits to skip (codes and their values) | number of coefficients << 5 | end of block << 12. 0: invalid or longer code.
_BITS, _PASSED, _END = 31, 5, 12
_LAST = 63  # index of a block's last coefficient


@njit(**OPTIONS)
def walk(jpeg, begin, end, units, blocks, is_dc, counts, symbols):
    """Returns True if the bytes from `begin` to `end` are exactly `units` MCUs, all of valid codes.

    Args:
        jpeg: uint8 bytes of the file.
        units: number of MCUs, each of which consists of `blocks`.
        blocks: (blocks, 2) numbers of each block's DC and AC table.
        is_dc: (tables,) True for a DC table.
        counts: (tables, 17) number of codes of each length; symbols: (tables, 256).
    """
    num = len(is_dc)
    single = np.zeros((num, 1 << _LOOK), dtype=np.uint16)
    several = np.zeros((num, 1 << _LOOK), dtype=np.uint16)
    limit = np.zeros((num, LONGEST_CODE + 1), dtype=np.int64)
    offset = np.zeros((num, LONGEST_CODE + 1), dtype=np.int64)
    for t in range(num):
        if not _unfold(counts[t], symbols[t], is_dc[t], single[t], limit[t], offset[t]):
            return False
        if not is_dc[t]:
            _combine(single[t], limit[t], several[t])
    at, bits, have = begin, np.uint64(0), 0
    for _ in range(units):
        for block in range(len(blocks)):
            dc, ac = blocks[block, 0], blocks[block, 1]
            if have <= 32:
                at, bits, have = _read(jpeg, at, end, bits, have)
            entry = np.int64(single[dc, bits >> np.uint64(64 - _LOOK)])
            if entry == 0:
                entry = _long(bits, symbols[dc], is_dc[dc], limit[dc], offset[dc])
                if entry == 0:
                    return False
            bits, have = bits << np.uint64(entry & _BITS), have - (entry & _BITS)
            k = 0
            while k < _LAST:
                if have <= 32:
                    at, bits, have = _read(jpeg, at, end, bits, have)
                entry = np.int64(several[ac, bits >> np.uint64(64 - _LOOK)])
                k += entry >> _PASSED & 127
                if entry == 0 or k + (entry >> _END) > _LAST:  # a long code, or the block ends among these coefficients
                    k -= entry >> _PASSED & 127
                    entry = np.int64(single[ac, bits >> np.uint64(64 - _LOOK)])
                    if entry == 0:
                        entry = _long(bits, symbols[ac], is_dc[ac], limit[ac], offset[ac])
                    k += entry >> _PASSED & 127
                    if entry == 0 or k > _LAST:
                        return False
                bits, have = bits << np.uint64(entry & _BITS), have - (entry & _BITS)
                if entry >> _END:
                    break
            if have < 0:
                return False
    return at == end and have < 8


@njit(**OPTIONS)
def _read(jpeg, at, end, bits, have):
    """Appends up to four bytes to `bits`, a buffer that is filled from its upper end; returns the new (at, bits, have).

    The zero after a 0xFF is skipped (byte stuffing). At 0xFF with another byte, a marker, reading stops.
    """
    if at + 4 <= end:
        i = np.uint64(at)
        a, b = np.uint32(jpeg[i]), np.uint32(jpeg[i + np.uint64(1)])
        c, d = np.uint32(jpeg[i + np.uint64(2)]), np.uint32(jpeg[i + np.uint64(3)])
        word = np.uint32(a << np.uint32(24)) | np.uint32(b << np.uint32(16)) | np.uint32(c << np.uint32(8)) | d
        # Bit trick: true if none of the four bytes is 0xFF, so that there is nothing to skip.
        if np.uint32(~word - np.uint32(0x01010101)) & word & np.uint32(0x80808080) == 0:
            word = np.uint64(word)
            return at + 4, bits | word << np.uint64(32 - have), have + 32
    for _ in range(4):
        if at >= end or (jpeg[at] == 0xFF and (at + 1 == end or jpeg[at + 1] != 0)):
            break
        bits, have = bits | np.uint64(jpeg[at]) << np.uint64(56 - have), have + 8
        at += 2 if jpeg[at] == 0xFF else 1
    return at, bits, have


@njit(**OPTIONS)
def _unfold(counts, symbols, is_dc, single, limit, offset):
    """Fills `single` with the entries of codes of up to _LOOK bits, and `limit` and `offset` for longer ones; False for an invalid table.

    limit: for each code length, the first 16-bit value beyond its codes; offset: for each length, the symbol's position minus the code.
    """
    code, place = 0, 0
    for length in range(1, LONGEST_CODE + 1):
        offset[length] = place - code
        if code + counts[length] >= 1 << length and counts[length]:  # a code of only ones is not allowed
            return False
        for _ in range(counts[length]):
            if is_dc and symbols[place] > 15:
                return False
            if length <= _LOOK:
                spread = 1 << (_LOOK - length)
                single[code * spread : (code + 1) * spread] = _entry(length, symbols[place], is_dc)
            code += 1
            place += 1
        limit[length] = code << (LONGEST_CODE - length)
        code <<= 1
    return True


@njit(**OPTIONS)
def _entry(length, symbol, is_dc):
    """Returns the table entry of a code, 0 for an invalid one.

    The symbol says how many bits of value follow; in an AC symbol, the upper four bits are the number of zero coefficients before it.
    """
    bits = symbol & 15
    if is_dc:
        return length + symbol if symbol <= 11 else 0
    if symbol == 0:
        return length | 1 << _END
    if symbol == 0xF0:
        return length | 16 << _PASSED
    return (length + bits) | (symbol >> 4) + 1 << _PASSED if 1 <= bits <= 10 else 0


@njit(**OPTIONS)
def _long(bits, symbols, is_dc, limit, offset):
    """Returns the entry of a code longer than _LOOK bits, or 0 if there is none."""
    value = np.int64(bits >> np.uint64(64 - LONGEST_CODE))
    if value < limit[_LOOK]:
        return 0
    for length in range(_LOOK + 1, LONGEST_CODE + 1):
        if value < limit[length]:
            return _entry(length, symbols[offset[length] + (value >> (LONGEST_CODE - length))], is_dc)
    return 0


@njit(**OPTIONS)
def _combine(single, limit, several):
    """Fills `several` with entries that combine as many whole codes as fit into _LOOK bits, up to the end of a block."""
    length = np.zeros(single.size, dtype=np.int64)  # length of the first code
    begin = 0
    for bits in range(1, _LOOK + 1):
        end = limit[bits] >> (LONGEST_CODE - _LOOK)
        length[begin:end] = bits
        begin = end
    for look in range(single.size):
        entry = np.int64(single[look])
        bits, passed, end = entry & _BITS, entry >> _PASSED & 127, entry >> _END
        while entry and not end and bits < _LOOK:
            following = look << bits & single.size - 1  # its last bits are zeros in place of unknown ones
            entry = np.int64(single[following])
            if entry == 0 or bits + length[following] > _LOOK or passed + (entry >> _PASSED & 127) > _LAST:
                break
            bits, passed, end = bits + (entry & _BITS), passed + (entry >> _PASSED & 127), entry >> _END
        several[look] = bits | passed << _PASSED | end << _END
