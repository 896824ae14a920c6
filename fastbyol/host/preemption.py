"""Requests to stop a run: SIGTERM from a scheduler, SIGUSR1 from SLURM, Ctrl-C, or the death of torchrun.

A thread reads the signals from a pipe. Python runs signal handlers only in the main thread and between two bytecode instructions, so
a process waiting in a collective for a dead rank would never run one.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from typing import Self

from fastbyol.config.console import say
from fastbyol.config.errors import STOPPED_EXIT

log = logging.getLogger("fastbyol")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
INTERRUPTED_EXIT = 130
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """While this context is active, STOP_SIGNALS set `requested` instead of ending the process. A second Ctrl-C ends it at once.

    Args:
        grace_s: seconds after the first signal when a process that is still running is ended, saved or not.
    """

    def __init__(self, *, grace_s: float) -> None:
        self.grace_s = grace_s
        self.name = ""
        """Name of the first signal."""
        self._requested = threading.Event()
        self._closed = threading.Event()

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

    def __enter__(self) -> Self:
        self._read, write = os.pipe()
        # set_wakeup_fd requires it: a signal handler must never block on a full pipe.
        os.set_blocking(write, False)
        # Signals that are ignored stay ignored: nohup relies on it.
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._write, self._earlier_descriptor = write, signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        # The handler only replaces the default action, which would end the process. The signal's number arrives through the pipe.
        self._earlier = {number: signal.signal(number, lambda *_: None) for number in heard}
        self._thread = threading.Thread(target=self._listen, name="fastbyol-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # The run is over. After a success a late signal must not change the exit code; after an error it may cut `HOLD_BACK_S` short.
        over = signal.SIG_IGN if kind is None else signal.SIG_DFL
        for number, handler in self._earlier.items():
            signal.signal(number, over if handler is _leave_at_once else handler)
        signal.set_wakeup_fd(self._earlier_descriptor)
        self._closed.set()
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _listen(self) -> None:
        while byte := os.read(self._read, 1):
            if byte[0] not in self._earlier:
                continue
            if not self.requested:
                self.name = signal.Signals(byte[0]).name
                log.info("%s: finishing this step, then saving and exiting (within %g s)", self.name, self.grace_s)
                self._requested.set()
                threading.Thread(target=self._leave_in_time, name="fastbyol-grace", daemon=True).start()
            elif byte[0] == signal.SIGINT:
                _leave("second Ctrl-C: exited without saving this step", INTERRUPTED_EXIT)

    def _leave_in_time(self) -> None:
        if not self._closed.wait(self.grace_s):
            _leave(f"{self.name}: not done after grace_s = {self.grace_s:g}: exited without saving this step", STOPPED_EXIT)


def leave_at_once_on_signals() -> None:
    """Makes STOP_SIGNALS end this process with the exit code of a stopped run.

    Scripts call it before imports that take seconds, when there is nothing to save. It lasts until `StopRequest` is entered.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave_at_once)


def _leave_at_once(number: int, _frame: object) -> None:
    if (os.environ.get("RANK") or "0") == "0":
        os.write(2, f"stopped ({signal.Signals(number).name}) before the first step; the same command continues\n".encode())
    os._exit(STOPPED_EXIT)


def end_with_torchrun() -> None:
    """Makes the kernel send SIGTERM to this process when torchrun dies, even by SIGKILL; otherwise workers would train on as orphans.
    Linux only.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent died before prctl took effect
        os.kill(os.getpid(), signal.SIGTERM)


def _leave(message: str, code: int) -> None:
    """Ends the process from a thread; checkpoints on the disk are complete at any time."""
    # os._exit below, because sys.exit would end only this thread.
    say(f"fastbyol: error: {message}; earlier checkpoints are complete", file=sys.stderr)
    os._exit(code)
