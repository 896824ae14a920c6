"""sha256 of what a conversion has written, taken by a thread while it is still in memory: read again at the end, it would cost minutes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from fastbyol.data.conversion.work_folder import WorkFolder
from fastbyol.data.manifest import sha256_of

_NOTE = "sha256 of "


class BackgroundDigests:
    """Of files in a work folder, or of stretches of them. A context manager, which ends its thread.

    They are among the folder's notes: a later run finds those that the journal has.
    """

    def __init__(self, work: WorkFolder) -> None:
        self._work = work
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastbyol-sha256")
        self._pending: dict[str, Future[str]] = {}

    def begin(self, name: str, *, start: int = 0, size: int | None = None) -> None:
        """What lies there will not change any more. size: bytes from `start`; None: to the end."""
        note = _note(name, start)
        if note not in self._work.notes and note not in self._pending:
            self._pending[note] = self._thread.submit(self._take, note, self._work.path / name, start, size)

    def result(self, name: str, *, start: int = 0, size: int | None = None) -> str:
        """Hexadecimal; waits for it if need be."""
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
