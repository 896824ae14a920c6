"""Stop signals: how a command ends early, how a conversion stops at a consistent point, and how a training run saves and exits.

- A command (`stoppable`): Ctrl-C, SIGTERM or a closed pipe ('| head') ends it without a traceback, with the exit code that a shell expects.
- A conversion (`deferred_stop`): the same signals wait until the data on the disk is consistent.
- A run (`StopRequest`): SIGTERM from a scheduler, SIGUSR1 from SLURM, Ctrl-C or the death of torchrun finish the step and save.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, Self

from fastbyol.config.console import say
from fastbyol.config.errors import INTERRUPTED_EXIT, STOPPED_EXIT

log = logging.getLogger("fastbyol")
COMMAND_SIGNALS = (signal.SIGINT, signal.SIGTERM)
RUN_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
DOUBLE_PRESS_S = 1.0
"""A Ctrl-C within this time of the first is taken for the same one: who presses it twice does not mean to lose the run."""
_PR_SET_PDEATHSIG = 1


class Stopped(KeyboardInterrupt):
    """Raised when a signal asks the command to stop; the message says what is left behind."""

    def __init__(self, signal_number: int, message: str = "stopped") -> None:
        super().__init__(message)
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """The exit code a shell reports for a process that the signal ended: 128 + signal number."""
        return 128 + self.signal_number


def end_at_once_when_stopped() -> None:
    """Makes SIGINT and SIGTERM end the process immediately, for times when there is nothing to lose."""
    # Scripts call this before their imports, where an exception would print the traceback of the module being imported.
    for number in COMMAND_SIGNALS:
        signal.signal(number, _end)


def stoppable(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps an entry point so that the first signal while it runs raises Stopped, which lets it clean up.

    A second signal, or one before or after the entry point, ends the process at once.
    """

    @functools.wraps(main)
    def guarded(*args: object, **kwargs: object) -> None:
        try:
            for number in COMMAND_SIGNALS:
                signal.signal(number, _raise)
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a pipe that closes, a worker's too, raises and does not end the process
            try:
                main(*args, **kwargs)
            finally:
                if sys.stdout is not None:  # None if the parent process closed it
                    sys.stdout.flush()
        except Stopped as stopped:
            end_at_once_when_stopped()
            say(f"fastbyol: {' '.join(str(stopped).split())}", file=sys.stderr)
            sys.exit(stopped.exit_code)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python's own flush at exit would fail again
            sys.exit(128 + signal.SIGPIPE)
        except OSError as error:
            # A full disk is the user's to mend; any other error keeps its traceback.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            say(f"fastbyol: error: {error.filename or 'the output'}: {error.strerror}; make room, or write elsewhere", file=sys.stderr)
            sys.exit(2)
        finally:
            end_at_once_when_stopped()

    return guarded


def _raise(number: int, _frame: FrameType | None) -> NoReturn:
    # From now on a second signal ends the process at once, instead of raising again in the middle of the clean-up.
    end_at_once_when_stopped()
    raise Stopped(number)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    os.write(2, b"fastbyol: stopped\n")
    os._exit(128 + number)


class OrderlyStop(Stopped):
    """Raised by `DeferredStop.check`: the work stopped at a point where its data is consistent."""


class DeferredStop:
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
def deferred_stop() -> Iterator[DeferredStop]:
    """Yields a DeferredStop that receives the stop signals. Outside the main thread, where Python allows no handlers, it receives none."""
    request = DeferredStop()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.handle) for number in COMMAND_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """While this context is active, RUN_SIGNALS set `requested` instead of ending the process. A second Ctrl-C, after DOUBLE_PRESS_S, ends it at once.

    A process that is still running `grace_s` seconds after the first signal is ended, saved or not.
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
        # A thread reads the signals from a pipe: Python runs handlers only in the main thread and between two bytecode instructions, so a
        # process that waits in a collective for a dead rank would never run one.
        self._read, write = os.pipe()
        # set_wakeup_fd requires it: a signal handler must never block on a full pipe.
        os.set_blocking(write, False)
        # Signals that are ignored stay ignored: nohup relies on it.
        heard = [number for number in RUN_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
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
        first = -math.inf
        while byte := os.read(self._read, 1):
            if byte[0] not in self._earlier:
                continue
            if not self.requested:
                self.name = signal.Signals(byte[0]).name
                log.info("%s: finishing this step, then saving and exiting (within %g s)", self.name, self.grace_s)
                self._requested.set()
                first = time.monotonic() if byte[0] == signal.SIGINT else -math.inf
                threading.Thread(target=self._leave_in_time, name="fastbyol-grace", daemon=True).start()
            elif byte[0] == signal.SIGINT and time.monotonic() - first > DOUBLE_PRESS_S:
                _leave("Ctrl-C while stopping: exited without saving the steps since the last checkpoint", INTERRUPTED_EXIT)

    def _leave_in_time(self) -> None:
        if not self._closed.wait(self.grace_s):
            _leave(f"{self.name}: not done after grace_s = {self.grace_s:g}: exited without saving this step", STOPPED_EXIT)


def leave_at_once_on_signals() -> None:
    """Makes RUN_SIGNALS end this process, which has nothing to save yet, as a stopped run; it lasts until `StopRequest` is entered."""
    for number in RUN_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave_at_once)


def _leave_at_once(number: int, _frame: object) -> None:
    if (os.environ.get("RANK") or "0") == "0":
        os.write(2, f"stopped ({signal.Signals(number).name}) before the first step; the same command continues\n".encode())
    os._exit(STOPPED_EXIT)


def end_with_torchrun() -> None:
    """Makes Linux send SIGTERM to this process when torchrun dies, even by SIGKILL; otherwise workers would train on as orphans."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def end_with_parent() -> None:
    """Makes Linux send SIGTERM to this process when the one that started it dies, even by SIGKILL. Elsewhere it does nothing."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent died before prctl took effect
        os.kill(os.getpid(), signal.SIGTERM)


def _leave(message: str, code: int) -> None:
    say(f"fastbyol: error: {message}; earlier checkpoints are complete", file=sys.stderr)
    os._exit(code)  # sys.exit would end only the thread that calls this
