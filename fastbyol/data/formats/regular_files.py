"""The check that what is read as a file is one: a stranger's archive can hold a named pipe of any name, whose reader waits for ever."""

from __future__ import annotations

import errno
from pathlib import Path


def require_regular(path: Path) -> None:
    """Raises OSError for a named pipe, a socket or a device. What is missing, or is a folder, has an error of its own when it is opened."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
