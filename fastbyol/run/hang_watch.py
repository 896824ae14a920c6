"""Ends a process that makes no progress: a dead disk, a hanging decoder or device would otherwise block the job for days."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from fastbyol.config.console import say
from fastbyol.config.errors import LOST_EXIT

PACKAGE = Path(__file__).resolve().parents[1]
MARGIN_S = 5.0
"""Extra seconds: collectives have the same time limit and report the cause better, so they should fail first."""


class HangWatch:
    """While this context is active, more than limit_s between two beats ends the process, with all threads' stacks and an error line.

    first_s: the limit before the first beat, if that is longer: the first step may compile.
    """

    def __init__(self, limit_s: float, *, first_s: float = 0.0) -> None:
        self.limit_s = limit_s
        self._extra_s = max(0.0, first_s - limit_s)
        self._watched = threading.get_ident()  # the thread that creates it: the one that trains
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fastbyol-hang-watch", daemon=True)
        self._last = time.monotonic()

    def beat(self) -> None:
        """Reports that a step is done."""
        self._last, self._extra_s = time.monotonic(), 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock inside the block."""
        self._last = float("inf")
        try:
            yield
        finally:
            self.beat()

    def __enter__(self) -> Self:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        limit_s = self.limit_s + MARGIN_S
        while not self._closed.wait(min(limit_s / 10, 5.0)):
            if time.monotonic() - self._last > limit_s + self._extra_s:
                self._end()

    def _end(self) -> None:
        place = _innermost_line(self._watched)
        # It writes straight to stderr's descriptor, so a thread that hangs inside logging or print cannot block it.
        faulthandler.dump_traceback(all_threads=True)
        say(
            f"fastbyol: error: no step for {self.limit_s + self._extra_s:g} s (timeout_s), the process waits in {place} (all stacks above); "
            "the same command continues from the last checkpoint",
            file=sys.stderr,
        )
        # sys.exit would end this thread only, and an exception does not reach a thread that waits in native code.
        os._exit(LOST_EXIT)


def _innermost_line(thread: int) -> str:
    """Returns the innermost line of this package on the thread's stack: 'data/loader.py:83 in batches'."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        file = Path(frame.f_code.co_filename).resolve()
        if file.is_relative_to(PACKAGE):
            return f"{file.relative_to(PACKAGE)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "code outside fastbyol"
