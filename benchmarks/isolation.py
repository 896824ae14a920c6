"""Runs a function in a process of its own: a crash, a hang or a broken CUDA context ends only that process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fastbyol.config.errors import UserError


class PartFailed(Exception):
    """The function gave no result; the message says why in one line."""


def run_isolated(function: Callable[..., Any], *arguments: Any, limit_s: float, log: Path) -> Any:
    """Returns the function's result, computed in a process of its own. Its output and traceback go to the log.

    Args:
        function: importable by name, as are the classes of its arguments.
        arguments: passed to the function.
        limit_s: seconds after which the process and all its children are killed.
        log: a file that is created or emptied.

    Raises:
        UserError: the function raised it.
        PartFailed: the function raised something else, ran too long, or died.
    """
    # A forked child cannot use CUDA once the parent has initialised it.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, function, arguments, str(log)))
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit_s):
            raise PartFailed(f"stopped at its limit of {limit_s:.0f} s; see {log.name}")
        kind, value = ours.recv()
    except EOFError:
        process.join()
        raise PartFailed(f"its process died (exit code {process.exitcode}); see {log.name}") from None
    finally:
        _kill_group(process)
    if kind == "user error":
        raise UserError(value)
    if kind == "failed":
        raise PartFailed(f"{value}; see {log.name}")
    return value


def _child(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], log: str) -> None:
    os.setsid()  # so that the compiler's workers can be killed with it
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
    try:
        pipe.send(("result", function(*arguments)))
    except UserError as error:
        pipe.send(("user error", str(error)))
    except BaseException as error:
        traceback.print_exc()
        pipe.send(("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
    sys.stdout.flush()


def _kill_group(process: Any) -> None:
    """Kills the process, which leads a process group of its own, and everything it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
