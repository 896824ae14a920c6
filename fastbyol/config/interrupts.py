"""Ctrl-C, SIGTERM, a reader that has left ('| head'): how a command ends early, without a traceback and with the exit code that a shell expects."""

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
    """The user or the scheduler wants an end; the message says what is left."""

    def __init__(self, signal_number: int, message: str = "stopped") -> None:
        super().__init__(message)
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """As a shell reports a process that the signal ended."""
        return 128 + self.signal_number


def end_at_once_when_stopped() -> None:
    """From here on, a signal ends the process between two instructions. For times when nothing is under way that could be lost.

    A script calls it before its imports: they take a third of a second, and an exception there would come with the traceback of whatever is
    being imported.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _end)


def stoppable(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps an entry point: while it runs, the first signal raises Stopped, so that all is left tidy; before and after, and twice, it ends at once."""

    @functools.wraps(main)
    def guarded(*args: object, **kwargs: object) -> None:
        try:
            for number in STOP_SIGNALS:
                signal.signal(number, _raise)
            try:
                main(*args, **kwargs)
            finally:
                if sys.stdout is not None:  # closed by who started this
                    sys.stdout.flush()
        except Stopped as stopped:
            end_at_once_when_stopped()
            say(f"fastbyol: {' '.join(str(stopped).split())}", file=sys.stderr)
            sys.exit(stopped.exit_code)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to print has nowhere to go
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
    end_at_once_when_stopped()
    raise Stopped(number)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    os.write(2, b"fastbyol: stopped\n")
    os._exit(128 + number)
