"""How far a conversion is: a moving bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from fastbyol.data.quantities import bytes_text, duration_text

_SECONDS_BETWEEN_LINES = 10.0


class ConversionProgress:
    """A context manager; `advance` is called for every image."""

    def __init__(self, what: str, *, done: int, total: int) -> None:
        """done: images that a former run has finished."""
        self._what, self._total = what, total
        self._done = self._first = done
        self._bytes = self._dropped = 0
        self._start = self._said = time.monotonic()
        self._bar = _bar(what, done=done, total=total) if sys.stderr.isatty() else None

    def advance(self, stored_bytes: int, *, dropped: bool) -> None:
        self._done += 1
        self._bytes += stored_bytes
        self._dropped += dropped
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self._done, text=self._text())
        elif time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES or self._done == self._total:
            print(f"{self._what}: {self._text()}", file=sys.stderr, flush=True)
            self._said = time.monotonic()

    def _text(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self._done - self._first) / seconds
        dropped = f", {self._dropped:,} dropped" if self._dropped else ""
        left = duration_text((self._total - self._done) / max(rate, 1e-9))
        return (
            f"{self._done:,} of {self._total:,} images, {bytes_text(self._bytes)}{dropped}, {rate:,.0f} images/s, "
            f"{bytes_text(self._bytes / seconds)}/s, {left} left"
        )

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()


def _bar(what: str, *, done: int, total: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[text]}", markup=False))
    progress = Progress(*columns, console=Console(stderr=True))
    progress.add_task(what, completed=done, total=total, text="")
    return progress
