"""Handles Ctrl-C and SIGTERM as a request to stop, which long work can answer at a point where all its data is consistent."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fastbyol.host.interrupts import STOP_SIGNALS, Stopped


class OrderlyStop(Stopped):
    """Raised by `StopRequest.check`: the work stopped at a point where its data is consistent."""


class StopRequest:
    """Stops the work at once, or, within `deferred()`, at the next call of `check`. A second signal always stops it at once."""

    def __init__(self) -> None:
        self._requested: int | None = None
        self._deferred = False

    def check(self) -> None:
        """Raises OrderlyStop if a signal has arrived."""
        if self._requested is not None:
            raise OrderlyStop(self._requested)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def handle(self, signal_number: int, _frame: FrameType | None) -> None:
        first = self._requested is None
        self._requested = signal_number
        if not (self._deferred and first):
            raise Stopped(signal_number, "stopped; the same command continues")


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Yields a StopRequest that receives the stop signals. Outside the main thread, where Python allows no handlers, it receives none."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
