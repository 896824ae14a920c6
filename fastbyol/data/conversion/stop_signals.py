"""Ctrl-C and SIGTERM as a request that long work meets at a point of its own choosing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The user or the scheduler wants an end; the message says how far the work is."""

    def __init__(self, signal_number: int, message: str, *, orderly: bool = False) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.orderly = orderly
        """Raised where the work waited for it, so that all is consistent."""

    @property
    def exit_code(self) -> int:
        """As a shell reports a process that the signal ended."""
        return 128 + self.signal_number


class StopRequest:
    """Ends the work at once, except within `deferred()`, where it waits until `check` is called. A second signal never waits."""

    def __init__(self) -> None:
        self._requested: int | None = None
        self._deferred = False

    def check(self) -> None:
        """Raises Stopped if a signal has come."""
        if self._requested is not None:
            raise Stopped(self._requested, "stopped", orderly=True)

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
    before = {number: signal.signal(number, request.handle) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
