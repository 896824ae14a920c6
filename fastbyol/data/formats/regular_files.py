"""Checks that a path is a regular file before it is read: a stranger's archive can hold a named pipe, whose reader waits for ever."""

from __future__ import annotations

import errno
from pathlib import Path


def require_regular(path: Path) -> None:
    """Raises OSError for a named pipe, a socket or a device. Missing paths and folders pass: opening them raises an error of its own."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
