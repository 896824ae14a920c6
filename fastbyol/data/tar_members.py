"""The members of a tar, by their headers alone: from one header to the next, with nothing taken on trust.

The standard library's tarfile parses; what it lets pass is caught here: a damaged header, which it takes for the end, and a long name or
extended attributes that would fill the memory.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

_LARGEST_HEADER = 1 << 20
_END_MARK = bytes(tarfile.BLOCKSIZE)


class DamagedTarError(Exception):
    """What is wrong with a tar."""

    def __init__(self, what: object, *, at: int, end: int) -> None:
        """at: byte of the header behind the last member that is whole."""
        super().__init__(f"{what} near byte {at:,} of {end:,}")
        self.at = at


def tar_members(file: BinaryIO, *, start: int = 0, end: int | None = None) -> Iterator[tarfile.TarInfo]:
    """The members of the tar that lies at the bytes [start, end) of an unbuffered file; offset_data counts from the start of the file.

    Raises DamagedTarError where the tar is cut or a header is not one. Other code may move the file's position between two members.
    """
    end = os.fstat(file.fileno()).st_size if end is None else end
    headers = _Headers(file, end)
    headers.seek(at := start)
    try:
        tar = tarfile.TarFile(fileobj=headers, mode="r")  # type: ignore[arg-type]
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined] # a million of them would fill a gigabyte
            if member.isreg() and not member.issparse() and member.offset_data + member.size > end:
                raise tarfile.ReadError(f"{member.name} is cut")
            yield member
            at = tar.offset
        headers.seek(tar.offset)
        if headers.read(tarfile.BLOCKSIZE) != _END_MARK:
            raise tarfile.ReadError("neither a header nor the end mark")
    except (tarfile.TarError, ValueError, RecursionError) as error:
        raise DamagedTarError(error, at=at, end=end) from error


class _Headers:
    """The file as tarfile reads headers from it: never past the end of this tar, never much at once."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self._file, self._end = file, end
        self.tell = file.tell
        self.seek = file.seek

    def read(self, size: int) -> bytes:
        if size > _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(max(0, min(size, self._end - self._file.tell())))
