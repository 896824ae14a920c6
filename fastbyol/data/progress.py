"""How far a long piece of work is: a moving bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import Any, Self

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows on stderr how much of `total` is done. Work that ends within seconds shows nothing in a log."""

    def __init__(self, what: str, total: int, *, unit: str = "bytes") -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = 0
        self._start = self._shown = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def reach(self, done: int) -> None:
        """This much is done in all."""
        self._done = done
        now = time.monotonic()
        if self._bar and now - self._shown >= 0.1:
            self._bar.update(self._task, completed=done)
            self._shown = now
        elif not self._bar and now - self._shown >= _SECONDS_BETWEEN_LINES:
            self._shown = now
            rate = done / (now - self._start)
            left = f", {(self._total - done) / rate:,.0f} s left" if rate else ""
            print(f"{self._what}: {done:,} of {self._total:,} {self._unit}, {rate:,.0f} {self._unit}/s{left}", file=sys.stderr)

    def advance(self, more: int) -> None:
        """So much more is done."""
        self.reach(self._done + more)
