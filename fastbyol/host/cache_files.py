"""Files that are computed once from other files: kept beside those, or in the user's cache folder if nothing can be written there."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastbyol.host.durable_files import locked_file

log = logging.getLogger("fastbyol")
_PATIENCE_S = 6 * 3600.0
"""Longest wait for another process, such as the first rank, that is making the file."""


@contextmanager
def cache_file(beside: Path, *, name: str, of: Sequence[Path]) -> Iterator[Path | None]:
    """Yields the path of the file, which only this process may write now; None, with a warning, if it can be kept nowhere.

    Args:
        beside: folder that is tried first. The second is fastbyol's folder in $XDG_CACHE_HOME, usually ~/.cache.
        name: beginning of the file's name, which goes on with a digest of the paths.
        of: the files from which it is made.
    """
    digest = hashlib.sha256("\0".join(os.path.abspath(path) for path in of).encode(errors="surrogateescape")).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "fastbyol"
    places = [beside / f".{name}-{digest}", cache / f"{name}-{digest}"]
    # An existing file first: the folder of the data may have become writable since the one in the cache was made.
    places.sort(key=lambda path: not path.exists())
    for path in places:
        lock = path.with_name(path.name + ".lock")
        try:
            if path.parent == cache:
                cache.mkdir(parents=True, exist_ok=True)
            descriptor = locked_file(lock, patience_s=_PATIENCE_S)
        except BlockingIOError:
            raise
        except OSError as error:
            refused = error
            continue
        try:
            yield path
        finally:
            lock.unlink(missing_ok=True)
            os.close(descriptor)
        return
    log.warning("%s and %s cannot be written (%s): what is found out about the files there is not kept", beside, cache, refused.strerror)
    yield None
