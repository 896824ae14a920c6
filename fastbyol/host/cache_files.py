"""Files that are computed once from other files: kept beside those, or in the user's cache folder if nothing can be written there."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastbyol.config.errors import UserError
from fastbyol.host.durable_files import locked_file
from fastbyol.host.store_path import Place, StorePath

log = logging.getLogger("fastbyol")
_PATIENCE_S = 6 * 3600.0
"""Longest wait for another process, such as the first rank, that is making the file."""


def kept_files(beside: Path | None, *, name: str, of: Sequence[Place]) -> list[Path]:
    """Returns the files that `cache_file` has made for the same arguments. They are only ever replaced as a whole, so they can be read without
    the lock, even in a folder that has become read-only.
    """
    return [path for path in _places(beside, name, of) if path.exists()]


@contextmanager
def cache_file(beside: Path | None, *, name: str, of: Sequence[Place]) -> Iterator[Path | None]:
    """Yields the path of the file, which only this process may write now; None, with a warning, if it can be kept nowhere.

    Args:
        beside: folder that is tried first; None: the files are at URLs. The second is fastbyol's folder in $XDG_CACHE_HOME, usually ~/.cache.
        name: beginning of the file's name, which goes on with a digest of the paths.
        of: the files from which it is made.

    Raises:
        UserError: another process has held the file for hours.
    """
    places = _places(beside, name, of)
    cache = places[-1].parent
    # An existing file first: the folder of the data may have become writable since the one in the cache was made.
    places.sort(key=lambda path: not path.exists())
    for path in places:
        lock = path.with_name(path.name + ".lock")
        try:
            if path.parent == cache:
                cache.mkdir(parents=True, exist_ok=True)
            descriptor = locked_file(lock, patience_s=_PATIENCE_S)
        except BlockingIOError as error:
            raise UserError(
                f"{lock}: {error.strerror} has held this lock for {_PATIENCE_S / 3600:g} hours; end that process, or delete the file if there is "
                "no such process"
            ) from error
        except OSError as error:
            refused = error
            continue
        try:
            yield path
        finally:
            lock.unlink(missing_ok=True)
            os.close(descriptor)
        return
    where = cache if beside is None else f"{beside} and {cache}"
    log.warning("%s cannot be written (%s): what is found out about the files is not kept", where, refused.strerror)
    yield None


def _places(beside: Path | None, name: str, of: Sequence[Place]) -> list[Path]:
    """Returns the paths that the file may have: beside the data, and in the user's cache folder."""
    texts = [str(path) if isinstance(path, StorePath) else os.path.abspath(path) for path in of]
    digest = hashlib.sha256("\0".join(texts).encode(errors="surrogateescape")).hexdigest()[:12]
    kept = cache_folder() / f"{name}-{digest}"
    return [kept] if beside is None else [beside / f".{name}-{digest}", kept]


def cache_folder() -> Path:
    """Returns fastbyol's folder in $XDG_CACHE_HOME, usually ~/.cache, which may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "fastbyol"
