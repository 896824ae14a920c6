"""Computes SHA-256 digests of written data in a thread, while it is still in the page cache: reading it again later would take minutes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from fastbyol.data.conversion.work_folder import WorkFolder
from fastbyol.data.formats.manifest import sha256_of

_NOTE = "sha256 of "


class BackgroundDigests:
    """Digests of files in a work folder or of byte ranges of them. A context manager that ends its thread.

    The digests are stored in the work folder's notes, so a resumed conversion finds those that the journal has.
    """

    def __init__(self, work: WorkFolder) -> None:
        self._work = work
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastbyol-sha256")
        self._pending: dict[str, Future[str]] = {}

    def begin(self, name: str, *, start: int = 0, size: int | None = None) -> None:
        """Starts the digest of bytes that will not change any more. size: number of bytes from `start`; None means to the end."""
        note = _note(name, start)
        if note not in self._work.notes and note not in self._pending:
            self._pending[note] = self._thread.submit(self._take, note, self._work.path / name, start, size)

    def result(self, name: str, *, start: int = 0, size: int | None = None) -> str:
        """Returns the hexadecimal digest; starts it, or waits for it, if necessary."""
        self.begin(name, start=start, size=size)
        note = _note(name, start)
        return self._work.notes.get(note) or self._pending[note].result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _take(self, note: str, path: Path, start: int, size: int | None) -> str:
        digest = self._work.notes[note] = sha256_of(path, start=start, size=size)
        return digest


def _note(name: str, start: int) -> str:
    return f"{_NOTE}{name}@{start}" if start else _NOTE + name
