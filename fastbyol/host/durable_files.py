"""Files that are either complete or absent, even after a power cut: written under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

UNFINISHED = ".tmp-"
"""Part of the name of every incomplete file, followed by the id of the process that writes it."""


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Yields an unbuffered binary file that gets its name when the block ends; an exception leaves the previous file in place."""
    unfinished = path.with_name(f"{path.name}{UNFINISHED}{os.getpid()}")
    try:
        with unfinished.open("wb", buffering=0) as file:
            yield cast(BinaryIO, file)
            os.fsync(file.fileno())
        # fsync must come before the rename: otherwise a power cut can leave the new name on an empty file.
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    flush_to_disk(path.parent)


def write_durably(path: Path, text: str) -> None:
    """Writes the text as UTF-8, or leaves the file as it was. Raises OSError if the disk is full or not writable."""
    with durable_file(path) as file:
        rest = memoryview(text.encode("utf-8", errors="surrogateescape"))
        while rest:
            rest = rest[file.write(rest) :]


def flush_to_disk(path: Path) -> None:
    """Flushes a file, or the list of names in a folder, to the disk. Without it a rename may reach the disk before the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
