"""Files at URLs that are needed as a whole on this machine: fetched once, in parts that are retried, and kept in the user's cache folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from fastbyol.config.errors import UserError
from fastbyol.host.cache_files import cache_folder
from fastbyol.host.durable_files import flush_to_disk, locked_file, write_durably
from fastbyol.host.progress import Progress
from fastbyol.host.quantities import bytes_text
from fastbyol.host.store_path import StorePath, at_once

PART_BYTES = 16 << 20
"""Bytes of one request."""
_PARTS_AT_ONCE = 8
_SAVED_EVERY = 8
"""Number of parts after which progress is recorded: a kill loses at most these."""
_PATIENCE_S = 6 * 3600.0
"""Longest wait for another process, such as the first rank, that is fetching the file."""


def copies_of(folder: StorePath) -> Path:
    """Returns the folder on this machine for copies of files in a folder at a URL. It may not exist yet."""
    return cache_folder() / "copies" / f"{hashlib.sha256(folder.url.encode()).hexdigest()[:12]}-{folder.name or 'files'}"


def local_copy(place: StorePath) -> tuple[Path, bool]:
    """Returns the path of a copy of the file, and whether it was fetched just now. A copy is used again while the store reports the
    same size and version.

    Raises UserError if there is no such file, no local file can have its name, the disk is full, or the file changes meanwhile, and Lost if the
    store does not answer. What has been fetched is kept, and the next call goes on there.
    """
    path = copies_of(place.parent) / place.local_name
    status = place.stat()
    facts, wanted = path.with_name(f".{place.name}.source"), {"url": place.url, "size": status.size, "version": status.version}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = locked_file(path.with_name(f".{place.name}.lock"), patience_s=_PATIENCE_S)
    except OSError as error:
        raise UserError(
            f"{path}: the copy of {place} cannot be written ({error.strerror}); set XDG_CACHE_HOME to another folder"
        ) from error
    try:
        known = _facts(facts) if status.version else {}
        if known == wanted and path.is_file() and path.stat().st_size == status.size:
            return path, False
        _fetch(place, path, facts, wanted, done=int(known.get("done", 0)) if wanted.items() <= known.items() else 0)
        return path, True
    except OSError as error:
        raise UserError(f"{path}: {place} cannot be copied there ({error.strerror or error}); make room, or set XDG_CACHE_HOME") from error
    finally:
        os.close(lock)


def forget(path: Path) -> None:
    """Removes a copy that turned out to be damaged."""
    path.unlink(missing_ok=True)
    path.with_name(f".{path.name}.source").unlink(missing_ok=True)


def _fetch(place: StorePath, path: Path, facts: Path, wanted: dict[str, object], *, done: int) -> None:
    size, unfinished = place.stat().size, path.with_name(f".{path.name}.part")
    done = min(done, unfinished.stat().st_size) if unfinished.exists() else 0
    free = shutil.disk_usage(path.parent).free
    if size - done > free:
        raise UserError(
            f"{place}: {bytes_text(size - done)} are to be copied to {path.parent}, where {bytes_text(free)} are free; make room, or set "
            "XDG_CACHE_HOME to a folder on a larger disk"
        )
    path.unlink(missing_ok=True)
    write_durably(facts, json.dumps(wanted | {"done": done}))
    with unfinished.open("r+b" if done else "wb", buffering=0) as file, Progress(f"fetching {place.name}", size, done=done) as progress:

        def fetch(start: int) -> int:
            part = place.read(start, min(PART_BYTES, size - start))
            # A full disk may take less than it is given; without an error the file would have a hole.
            if os.pwrite(file.fileno(), part, start) < len(part):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return len(part)

        for number, written in enumerate(at_once(fetch, range(done, size, PART_BYTES), requests=_PARTS_AT_ONCE), start=1):
            done += written
            progress.advance(written)
            if number % _SAVED_EVERY == 0:
                os.fsync(file.fileno())
                write_durably(facts, json.dumps(wanted | {"done": done}))
        os.fsync(file.fileno())
    if done != size or {"url": place.url, **place.stat()._asdict()} != wanted:
        unfinished.unlink()
        raise UserError(f"{place}: changed while it was fetched; repeat the command")
    unfinished.replace(path)
    flush_to_disk(path.parent)
    write_durably(facts, json.dumps(wanted))


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) and isinstance(facts.get("done", 0), int) else {}
