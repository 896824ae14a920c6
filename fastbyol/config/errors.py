"""Exceptions that end a command with one line and an exit code of their own, checks that raise them, and the entry points' error handler.

Exit codes: 0 complete, 1 a bug in fastbyol (with a traceback), and those below. torchrun itself always exits with 1 if a worker
failed; the worker's own exit code is in torchrun's report.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import reprlib
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from fastbyol.config.console import accept_any_text, say
from fastbyol.config.packages import part_of
from fastbyol.config.urls import public_text, without_credentials

USER_ERROR_EXIT = 2
"""Bad input: the same command would fail again."""
DIVERGED_EXIT = 3
"""The loss or the weights are no longer finite, or the run has collapsed: the same command would fail again."""
STORAGE_EXIT = 4
"""The last checkpoint could not be written, or there is no room for one: free some space, then the same command continues from the previous one."""
LOST_EXIT = 5
"""Another rank, the data or the device stopped responding: the same command continues from the last checkpoint."""
STOPPED_EXIT = 75
"""Stopped by a signal: the same command continues from the last checkpoint, which is of the last step unless saving it took longer than
grace_s (75 is 'temporary failure' in sysexits.h).
"""
INTERRUPTED_EXIT = 130
"""Ended by Ctrl-C, as shells report it; nothing is saved."""
HOLD_BACK_S = 10.0
"""Seconds that ranks other than 0 wait before they print an error, so that an error all ranks share is printed only once.

torchrun ends the others as soon as rank 0 exits.
"""


class UserError(ValueError):
    """An error that the user can fix: the message names the thing, its value and the way out."""


class RunError(Exception):
    """A run cannot continue for a reason other than its input: the message says what happened and what is saved."""

    exit_code = 1


class Diverged(RunError):
    """The loss or the weights are not finite, or every image gets the same projection."""

    exit_code = DIVERGED_EXIT


class NotSaved(RunError):
    """The last checkpoint could not be written to disk, or there is no room for the first."""

    exit_code = STORAGE_EXIT


class Lost(RunError):
    """Another rank, a store or a machine of a Ray cluster ended, hung or cannot be reached."""

    exit_code = LOST_EXIT


def is_out_of_memory(error: BaseException) -> bool:
    """Says whether the device is out of memory; the driver, cuBLAS, cuDNN and torch's allocators say it in different words and types."""
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    )


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps an entry point: UserError and RunError print 'fastbyol: error: …' on stderr and exit with their code.

    So do a file that the system refuses (`_refused_file`) and a package of ours that is not installed (`_missing_package`), with exit code 2.
    Other exceptions keep their traceback. Secrets in URLs are taken out of the arguments first (`config/urls.py`), and out of tracebacks.
    """

    @functools.wraps(main)
    def guarded(*args: object, **kwargs: object) -> None:
        accept_any_text()
        sys.excepthook = _print_traceback
        try:
            sys.argv[1:] = public_arguments(sys.argv[1:])
            main(*args, **kwargs)
        except KeyboardInterrupt:
            say("fastbyol: stopped", file=sys.stderr)
            sys.exit(INTERRUPTED_EXIT)
        except Exception as error:
            text = str(error) if isinstance(error, UserError | RunError) else _refused_file(error) or _missing_package(error)
            if not text:
                raise
            rank = os.environ.get("RANK") or "0"
            if rank != "0" and "MASTER_ADDR" in os.environ:  # a launcher started it
                # If rank 0 has the same error, torchrun ends this process before it prints.
                time.sleep(HOLD_BACK_S)
            say(f"fastbyol: error: {' '.join(text.split())}" + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr)
            sys.exit(error.exit_code if isinstance(error, RunError) else USER_ERROR_EXIT)

    return guarded


def _refused_file(error: Exception) -> str:
    """Returns the file, the reason and the way out for an operating-system error about a file; '' for any other error.

    Missing files and files that already exist have no entry in `_WAYS_OUT`: commands report the ones they expect themselves, so one that
    arrives here is a bug of ours, whose traceback is needed.
    """
    if not isinstance(error, OSError) or not isinstance(error.filename, str | bytes) or error.errno not in _WAYS_OUT:
        return ""
    return f"{os.fsdecode(error.filename)}: cannot be used ({os.strerror(error.errno)}); {_WAYS_OUT[error.errno]}"


_WAYS_OUT = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "ask for permission to use it and the folders that it is in, or give another path"),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS), "give another path"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, or give another path"),
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ENOTCONN), "its disk or file server fails; copy it elsewhere"
    ),
}
"""Advice for a file that the system refuses, by the number of the error. Only errors that the user's paths or disks cause are listed."""


def _missing_package(error: Exception) -> str:
    """Returns, for the import error of a missing package of ours, its name and the command that installs it; else ''."""
    part = part_of(error.name or "") if isinstance(error, ModuleNotFoundError) else None
    return f"{part.package} is not installed; {part.command} (python -m fastbyol doctor lists everything that is missing)" if part else ""


def public_argument(text: str) -> str:
    """Returns an argument with the secrets taken out of its URLs. Raises UserError if it is not clear where they end."""
    return public_arguments([text])[0]


def public_arguments(texts: Sequence[str]) -> list[str]:
    """Returns all arguments of a command with the secrets taken out, as `public_argument` does for one."""
    queries: dict[str, str] = {}
    try:
        return [public_text(text, queries=queries) for text in texts]
    except ValueError as error:
        raise UserError(str(error)) from None


def _print_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    sys.stderr.write(without_credentials("".join(traceback.format_exception(kind, error, where))))


def environment_integer(name: str, default: int, environment: Mapping[str, str] = os.environ) -> int:
    """Returns an integer environment variable that a launcher sets, or the default if it is unset or empty."""
    text = environment.get(name) or str(default)
    try:
        return int(text)
    except ValueError as error:
        raise UserError(
            f"{name} = {text!r}: this environment variable must be an integer; torchrun and srun set it; without them, unset it"
        ) from error


def shortened(text: object, *, limit: int = 200) -> str:
    """Returns the text in one line of at most `limit` characters; for an exception without a message, its type."""
    return " ".join(str(text).split())[:limit] or type(text).__name__


def first_line(error: Exception, *, limit: int = 120) -> str:
    """Returns the first line of the error's message, at most `limit` characters; its type if there is no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 300
_SHORT.maxlong, _SHORT.maxlevel = 60, 2


def shown(value: object) -> str:
    """Returns the value as shown in an error, at most one line: a few bytes of YAML or pickle can expand to gigabytes."""
    try:
        return _SHORT.repr(value)
    except (ValueError, RecursionError):  # Python refuses to print an integer of thousands of digits
        return f"a {type(value).__name__}"


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raises UserError 'name = value: must be allowed' unless the condition holds."""
    if not condition:
        raise UserError(f"{name} = {shown(value)}: must be {allowed}")


def require_probability(name: str, value: float) -> None:
    require(math.isfinite(value) and 0.0 <= value <= 1.0, name, value, "a probability in [0, 1]")


def require_range(name: str, value: tuple[float, float], low: float, high: float) -> None:
    ordered = len(value) == 2 and all(math.isfinite(v) for v in value) and low <= value[0] <= value[1] <= high
    require(ordered, name, value, f"an increasing pair within [{low:g}, {high:g}]")


def require_at_least(name: str, value: float, low: float) -> None:
    require(math.isfinite(value) and value >= low, name, value, f"a number >= {low:g}")


def require_between(name: str, value: float, low: float, high: float) -> None:
    require(math.isfinite(value) and low <= value <= high, name, value, f"a number in [{low:g}, {high:g}]")


def require_positive(name: str, value: float) -> None:
    require(math.isfinite(value) and value > 0, name, value, "a number > 0")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, name, value, "one of " + ", ".join(choices))
