"""Progress of long work: a progress bar on a terminal, a plain line every ten seconds in a log."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Self

from fastbyol.config.console import printable, say
from fastbyol.host.quantities import bytes_text, duration_text

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_BARS = 0.1
_BAR_WIDTH = 10


class Progress:
    """Context manager that shows on stderr how much is done, the rate, and the time left.

    Work that takes under ten seconds leaves nothing on the terminal and writes nothing to a log.
    """

    def __init__(self, what: str, total: int, *, unit: str = "bytes", done: int = 0) -> None:
        """Starts at `done` of `total` units, where `done` was already finished by an earlier process."""
        self._what, self._total, self._unit = what, total, unit
        self._done = self._first = done
        self._stored = self._dropped = 0
        self._start = self._shown = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Self:
        if console := bar_console():
            self._bar = text_bar(console, bar_width=_BAR_WIDTH)
            self._bar.add_task(f"{printable(self._what)}:", completed=self._done, total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            # Work that was quick leaves nothing behind.
            self._bar.live.transient = time.monotonic() - self._start < _SECONDS_BETWEEN_LINES
            self._bar.stop()

    def reach(self, done: int) -> None:
        """Sets the total amount done, and updates the display if it is time to."""
        self._done = done
        now = time.monotonic()
        is_last = done == self._total
        if self._bar and (now - self._shown >= _SECONDS_BETWEEN_BARS or is_last):
            self._bar.update(self._bar.task_ids[0], completed=done, description=f"{printable(self._what)}: {self._text(now)}")
            self._shown = now
        elif not self._bar and now - (self._start if is_last else self._shown) >= _SECONDS_BETWEEN_LINES:
            say(f"{self._what}: {self._text(now)}", file=sys.stderr)
            self._shown = now

    def advance(self, more: int = 1, *, stored_bytes: int = 0, dropped: int = 0) -> None:
        """Adds `more` units to the amount done. They produced `stored_bytes`; `dropped` of the units produced nothing."""
        self._stored += stored_bytes
        self._dropped += dropped
        self.reach(self._done + more)

    def _text(self, now: float) -> str:
        seconds = max(now - self._start, 1e-9)
        rate = (self._done - self._first) / seconds
        # The most important first: a narrow terminal cuts the line on its right.
        parts = [f"{self._number(self._done)} of {self._amount(self._total)}"]
        if self._dropped:
            parts.append(f"{self._dropped:,} dropped")
        if self._done == self._total:
            parts.append(f"in {duration_text(seconds)}")
        elif rate:
            parts.append(f"{duration_text((self._total - self._done) / rate)} left")
        parts.append(f"{self._amount(rate)}/s")
        if self._stored:
            parts += [bytes_text(self._stored), f"{bytes_text(self._stored / seconds)}/s"]
        return ", ".join(parts)

    def _number(self, count: float) -> str:
        if self._unit == "bytes":
            return bytes_text(count)
        return f"{count:,.0f}" if count >= 10 or count == int(count) else f"{count:.1f}"

    def _amount(self, count: float) -> str:
        return self._number(count) if self._unit == "bytes" else f"{self._number(count)} {self._unit}"


def bar_console() -> Console | None:
    """Returns stderr's console if that is a terminal that can draw a bar, else None."""
    # Not rich's own test: with FORCE_COLOR, as in many CI jobs, it takes a log for a terminal.
    if not sys.stderr.isatty():
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return None if console.is_dumb_terminal else console


def text_bar(console: Console, *columns: Any, bar_width: int, refresh_per_s: float = 10) -> Any:
    """Returns rich's progress display: the columns, a bar, and the task's description, whose end a narrow terminal cuts."""
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Display
    from rich.table import Column

    bar = BarColumn(bar_width=bar_width, table_column=Column(min_width=bar_width))
    text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    return Display(*columns, bar, text, console=console, refresh_per_second=refresh_per_s)
