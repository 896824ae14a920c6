"""Files that are whole under their name or not there, also after a power cut: written under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

UNFINISHED = ".tmp-"
"""Stands in the name of every file that is not whole yet, before the process that writes it."""


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file without a buffer to write into; it takes its name when the block ends, and an exception leaves what was there before."""
    unfinished = path.with_name(f"{path.name}{UNFINISHED}{os.getpid()}")
    try:
        with unfinished.open("wb", buffering=0) as file:
            yield cast(BinaryIO, file)
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    flush_to_disk(path.parent)


def write_durably(path: Path, text: str) -> None:
    """Writes the text, as UTF-8, or leaves the file as it was. OSError where the disk is full or not writable."""
    with durable_file(path) as file:
        rest = memoryview(text.encode("utf-8", errors="surrogateescape"))
        while rest:
            rest = rest[file.write(rest) :]


def flush_to_disk(path: Path) -> None:
    """Forces a file, or a folder's list of names, to the disk: a rename must not outrun the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
