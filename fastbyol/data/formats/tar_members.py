"""Lists the members of a tar by reading its headers only, without trusting any value in them.

It uses the standard library's parser for a single header, but not its loop over headers: `tarfile` takes a damaged header for the end of the
archive, loops for ever at a negative size, does not read an archive appended to the first, and spends hours or gigabytes on malicious
extended headers.
"""

from __future__ import annotations

import errno
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

LARGEST_HEADER = 1 << 20
"""Largest total size of one member's headers: long name, extended attributes, sparse map."""
_BLOCK = tarfile.BLOCKSIZE
_END_MARK = bytes(_BLOCK)
_READ_BYTES = 1 << 20
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_RECORDS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_SPARSE_IS_EXTENDED, _EXTENSION_IS_EXTENDED = 482, 504
"""Offsets, in GNU's header of a sparse file and in each block of its map, of the flag that another block of the map follows."""


class DamagedTarError(Exception):
    """Raised for a damaged tar; `at` is the byte at which the readable part ends."""

    def __init__(self, what: object, *, at: int, end: int) -> None:
        """what: the damage; at: offset of the header after the last intact member; end: size of the tar."""
        super().__init__(f"{what} near byte {at:,} of {end:,}")
        self.at = at


def tar_members(file: BinaryIO, *, start: int = 0, end: int | None = None) -> Iterator[tarfile.TarInfo]:
    """Yields the members of the tar in bytes [start, end) of an unbuffered file; `offset_data` counts from the start of the file.

    Concatenated archives (cat a.tar b.tar) are read to the last. For sparse members `issparse()` is true, but they have no map. The caller may
    move the file's position between two members. Raises DamagedTarError if the tar is truncated, a header is invalid, a size is impossible, or
    the data after the end mark is not another archive.
    """
    end = os.fstat(file.fileno()).st_size if end is None else end
    at = start
    try:
        while True:
            member, following = _member_at(file, at, end)
            if member is not None:
                yield member
            elif (following := _skip_zeros(file, at, end)) >= end:
                return
            at = following
    except (tarfile.TarError, ValueError) as error:
        raise DamagedTarError(error, at=at, end=end) from error


def _member_at(file: BinaryIO, first: int, end: int) -> tuple[tarfile.TarInfo | None, int]:
    """Returns the member whose headers begin at byte `first`, and the offset of the next one; (None, first) at an end mark."""
    at, told = first, dict[str, str]()
    while True:
        block = _read(file, at, _BLOCK, end)
        if block == _END_MARK and at == first:
            return None, first
        try:
            member = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
        except tarfile.TarError:
            raise tarfile.ReadError("neither a header nor the end mark") from None
        at += _BLOCK
        if member.size < 0:
            raise tarfile.ReadError(f"{member.name!r} has a size of {member.size:,} bytes")
        if member.type not in (*_LONG_NAMES, *_RECORDS, tarfile.XGLTYPE):
            break
        if at + member.size - first > LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {member.size:,} bytes")
        content = _read(file, at, member.size, end)
        at += _whole_blocks(member.size)
        if member.type in _LONG_NAMES:
            key = "path" if member.type == tarfile.GNUTYPE_LONGNAME else "linkpath"
            told[key] = _text(content.partition(b"\0")[0])
        elif member.type in _RECORDS:  # global records (XGLTYPE) have no name or size of a member: skip them
            told |= _records(content)
    goes_on = member.type == tarfile.GNUTYPE_SPARSE and block[_SPARSE_IS_EXTENDED]
    while goes_on:  # another block of the sparse map
        if at + _BLOCK - first > LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of more than {LARGEST_HEADER:,} bytes")
        goes_on = _read(file, at, _BLOCK, end)[_EXTENSION_IS_EXTENDED]
        at += _BLOCK
    _apply(member, told)
    member.offset, member.offset_data = first, at
    # A link or folder may state a size, but no data follows it; unknown types are read like files, as POSIX says.
    if not member.isreg() and member.type in tarfile.SUPPORTED_TYPES:
        return member, at
    if at + member.size > end:
        raise tarfile.ReadError(f"{member.name!r} is cut")
    return member, at + _whole_blocks(member.size)


def _apply(member: tarfile.TarInfo, told: dict[str, str]) -> None:
    """Sets the member's name, link target, size and sparseness from its extended headers."""
    name = told.get("GNU.sparse.name", told.get("path", member.name))
    member.name = name.rstrip("/") if member.isdir() else name
    member.linkname = told.get("linkpath", member.linkname)
    if (size := told.get("size")) is not None:
        if not size.isdecimal():
            raise tarfile.ReadError(f"{member.name!r} has a size of {size[:40]!r} bytes")
        member.size = int(size)
    if member.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in told):
        member.sparse = []  # type: ignore[attr-defined] # issparse() tests this attribute


def _records(content: bytes) -> dict[str, str]:
    """Parses the records 'length key=value\\n' of an extended header into a dict."""
    told, at = dict[str, str](), 0
    while at < len(content) and content[at]:
        digits, space, _ = content[at : at + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = content[at + len(digits) + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if not equals or not record.endswith(b"\n") or at + length > len(content):
            raise tarfile.ReadError("an extended header that is damaged")
        told[_text(key)] = _text(value[:-1])
        at += length
    return told


def _skip_zeros(file: BinaryIO, at: int, end: int) -> int:
    """Returns the offset of the first block from `at` on that is not all zeros, or `end`: tars are padded, and another archive may follow."""
    start = at
    while at < end:
        at = max(at, min(end, start + (_next_data(file, at, end) - start) // _BLOCK * _BLOCK))
        piece = _read(file, at, min(_READ_BYTES, end - at), end)
        if zeros := len(piece) - len(piece.lstrip(b"\0")):
            at += zeros if zeros == len(piece) else zeros // _BLOCK * _BLOCK
        if zeros < len(piece):
            return at
    return end


def _next_data(file: BinaryIO, at: int, end: int) -> int:
    """Returns the end of a hole (sparse region) of the file at `at`, or `at` if there is none. Reading a hole of terabytes would take hours."""
    try:
        return os.lseek(file.fileno(), at, os.SEEK_DATA)
    except OSError as error:  # ENXIO: a hole up to the end; others: no regular file, or a file system without SEEK_DATA
        return end if error.errno == errno.ENXIO else at


def _read(file: BinaryIO, at: int, size: int, end: int) -> bytes:
    file.seek(at)
    content = file.read(max(0, min(size, end - at)))
    if len(content) != size:
        raise tarfile.ReadError("the end of the file instead of a header or the end mark")
    return content


def _whole_blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _text(content: bytes) -> str:
    return content.decode(tarfile.ENCODING, "surrogateescape")
