"""Ctrl-C and SIGTERM as a request that long work meets at a point of its own choosing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fastbyol.config.interrupts import STOP_SIGNALS, Stopped


class OrderlyStop(Stopped):
    """Raised where the work waited for it, so that all is consistent."""


class StopRequest:
    """Ends the work at once, except within `deferred()`, where it waits until `check` is called. A second signal never waits."""

    def __init__(self) -> None:
        self._requested: int | None = None
        self._deferred = False

    def check(self) -> None:
        """Raises OrderlyStop if a signal has come."""
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
    """Signals go to the request that is given; outside the main thread, which alone may handle them, they are left as they are."""
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
