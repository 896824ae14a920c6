"""Files that are either complete or absent, even after a power cut, and locks.

A file is written under another name, flushed to the disk, then renamed.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from fastbyol.config.errors import UserError

log = logging.getLogger("fastbyol")
UNFINISHED = ".tmp-"
"""Part of the name of every incomplete file, followed by the id of the process that writes it."""
_FOLDER_TRIES = 100
"""Number of attempts to make a lock's folder, which the lock's holder may remove when it has finished."""


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Yields an unbuffered binary file that gets its name when the block ends; an exception leaves the previous file in place."""
    unfinished = path.with_name(f"{path.name}{UNFINISHED}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        # "x" follows no link: in a folder that others can write to, one of this name could lead to any file of this user.
        with unfinished.open("xb", buffering=0) as file:
            yield cast(BinaryIO, file)
            os.fsync(file.fileno())
        # fsync must come before the rename: otherwise a power cut can leave the new name on an empty file.
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    # The new name is part of the folder, which has to reach the disk by itself.
    flush_to_disk(path.parent)


def write_durably(path: Path, text: str) -> None:
    """Writes the text as UTF-8, or leaves the file as it was. Raises OSError if the disk is full or not writable."""
    with durable_file(path) as file:
        write_all(file, text.encode("utf-8", errors="surrogateescape"))


def write_all(file: BinaryIO, data: bytes) -> None:
    """Writes all of the data: an unbuffered file may write less than it is given."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def flush_to_disk(path: Path) -> None:
    """Flushes a file, or the list of names in a folder, to the disk. Without it a rename may reach the disk before the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def holder_of_lock(path: Path) -> str:
    """Returns the process that holds the lock of a file, as `locked_file` names it, or '' if nobody does or the file system has no locks."""
    if not path.is_file():
        return ""
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read(200).decode(errors="replace").strip() or "another process"
    except OSError:
        pass
    return ""


def locked_file(path: Path, *, patience_s: float = 0.0) -> int:
    """Locks a file for this process, in a folder that is created if needed; returns a descriptor whose closing releases the lock.

    A file system without locks is used unlocked, with a warning. Raises BlockingIOError, whose `strerror` names the other process, if that
    has not released the lock within `patience_s`, and UserError if the file is a symbolic link: anyone who can write to the folder could let it
    lead to another file of this user, which the holder's name would overwrite.
    """
    deadline, waits, tries = time.monotonic() + patience_s, False, 0
    while True:
        path.parent.mkdir(exist_ok=True)
        try:
            # NFS can only lock a file that is open for writing.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # less the umask, so that a group may share it
        except FileNotFoundError:
            tries += 1
            if tries == _FOLDER_TRIES:
                raise
            continue  # its holder has just finished and removed the folder
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UserError(f"{path}: is a symbolic link, and a lock may not lead to another file; remove it") from None
            raise
        # flock, not the existence of a file: the system releases it when the process ends, even by SIGKILL.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if time.monotonic() >= deadline:
                raise BlockingIOError(error.errno, holder, str(path)) from None
            if not waits:
                log.info("%s is in use by %s; waiting for it", path.parent, holder)
            waits = True
            time.sleep(0.2)
            continue
        except OSError as error:
            log.warning("%s: cannot be locked (%s); make sure that only one job writes there", path.parent, error.strerror)
        # A holder may have removed the file before it released the lock: then this is the lock of a file that no longer has this name.
        if _is_at(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Returns True if the open file has this path. Its number of links says less: NFS keeps one for a file that is still open."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
