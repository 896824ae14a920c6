"""Columns of numbers, one row per image, that all processes of a machine map from one file: they are in memory once, and made once.

The data's own tables are not mapped: a process that touches a map whose file was truncated dies of SIGBUS. The file here is our own and only
ever replaced as a whole, so a process keeps the version that it has mapped.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.host.cache_files import cache_file, kept_files
from fastbyol.host.durable_files import durable_file

log = logging.getLogger("fastbyol")
Columns = dict[str, NDArray[Any]]
SHARED_ROWS = 1 << 21
"""Tables with fewer rows are not worth a file: ImageNet's takes 40 MB in each process."""
_FORMAT = 1
_HEADER = 4096
"""Bytes before the first column, which hold the facts as JSON; each column starts at a multiple of this."""
_NAME = "fastbyol-table"
"""Beginning of the file's name."""
ROWS_AT_ONCE = 1 << 18
"""Rows that are read, checked or computed on at a time: whole columns of intermediate values would double the memory."""


def row_pieces(rows: int) -> Iterator[slice]:
    """Yields the slices, of ROWS_AT_ONCE rows or fewer, that make up a column of so many rows."""
    for first in range(0, rows, ROWS_AT_ONCE):
        yield slice(first, min(first + ROWS_AT_ONCE, rows))


def shared_columns(of: Path, *, rows: int, facts: dict[str, Any], dtypes: dict[str, str], make: Callable[[], Columns]) -> Columns:
    """Returns the columns that `make` returns, mapped from a file if there are at least SHARED_ROWS rows and a file can be kept.

    The arrays may be written to, which changes them in this process alone. A caller that does not trust the file must check the values.

    Args:
        of: the file that the columns are made from; theirs lies beside it, or in the user's cache folder.
        rows: length of every column.
        facts: plain values that the columns depend on; a file with others is made anew.
        dtypes: the columns' names and types.
        make: reads the columns; called by one process of the machine, and by each if no file can be kept.
    """
    if rows < SHARED_ROWS:
        return make()
    told = {"format": _FORMAT, "rows": rows, "dtypes": dtypes, "facts": facts}
    for path in kept_files(of.parent, name=_NAME, of=[of]):
        if (columns := _mapped(path, told)) is not None:
            return columns
    with cache_file(of.parent, name=_NAME, of=[of]) as path:
        if path is None:
            return make()
        columns = _mapped(path, told)  # another process may have written it meanwhile
        if columns is None:
            columns = make()
            try:
                _write(path, told, columns)
            except OSError as error:
                log.warning("%s: cannot be written (%s); each process keeps the table in its own memory", path, error.strerror or error)
                return columns
            columns = _mapped(path, told) or columns
        return columns


def _mapped(path: Path, told: dict[str, Any]) -> Columns | None:
    """Returns the columns of a file, or None if there is none, it is damaged, or it was made of something else."""
    try:
        with path.open("rb") as file:
            if json.loads(file.read(_HEADER).rstrip(b"\0")) != told:
                return None
            starts, end = _layout(told)
            if os.fstat(file.fileno()).st_size != end:
                return None
            # Copy on write: pages are shared with the other processes as long as nobody writes to them.
            return {
                column: np.memmap(file, dtype=dtype, mode="c", offset=starts[column], shape=(told["rows"],)).view(np.ndarray)
                for column, dtype in told["dtypes"].items()
            }
    except (OSError, ValueError, RecursionError):
        return None


def _write(path: Path, told: dict[str, Any], columns: Columns) -> None:
    header = json.dumps(told).encode()
    if len(header) > _HEADER:
        raise OSError(f"a header of {len(header)} bytes")
    starts, end = _layout(told)
    with durable_file(path) as file:
        file.write(header + bytes(_HEADER - len(header)))
        for column, start in starts.items():
            file.seek(start)
            for piece in row_pieces(told["rows"]):
                np.ascontiguousarray(columns[column][piece], dtype=told["dtypes"][column]).tofile(file)
        file.truncate(end)


def _layout(told: dict[str, Any]) -> tuple[dict[str, int], int]:
    """Returns the offset of each column, and the size of the file."""
    starts, end = {}, _HEADER
    for column, dtype in told["dtypes"].items():
        starts[column] = end
        end += -(-told["rows"] * np.dtype(dtype).itemsize // _HEADER) * _HEADER
    return starts, end
