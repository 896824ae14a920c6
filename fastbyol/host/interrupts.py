"""Ending a command early, by Ctrl-C, SIGTERM or a closed pipe ('| head'): no traceback, and the exit code that a shell expects."""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from fastbyol.config.console import say

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
    """Makes SIGINT and SIGTERM end the process immediately, for times when there is nothing to lose.

    Scripts call it before their imports, which take a third of a second: an exception there would print the traceback of the module
    being imported.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _end)


def stoppable(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps an entry point so that the first signal while it runs raises Stopped, which lets it clean up.

    A second signal, or one before or after the entry point, ends the process at once.
    """

    @functools.wraps(main)
    def guarded(*args: object, **kwargs: object) -> None:
        try:
            for number in STOP_SIGNALS:
                signal.signal(number, _raise)
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
