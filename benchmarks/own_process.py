"""Runs work in a process of its own, where what it does to memory, torch's settings or the GPU disturbs nothing else."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.timing import count_cpu_seconds
from fastbyol.config.errors import UserError


def start_process(serve: Callable[..., None], *arguments: Any, daemon: bool) -> tuple[Any, Connection]:
    """Starts a process that runs `serve(pipe, *arguments)` until the pipe is closed; returns it with the other end. daemon: may start none itself."""
    # Spawned, because a forked child cannot use CUDA once the parent has initialised it.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, *arguments), daemon=daemon)
    process.start()
    theirs.close()  # while a copy of it is open here, the death of the process is no end of file
    return process, ours


@contextlib.contextmanager
def in_own_process(make: Callable[..., Callable[[], object]], *arguments: Any) -> Iterator[Callable[[], None]]:
    """Yields a function that calls `make(*arguments)()`, made once, in the other process. Its CPU time counts as if spent here."""
    process, pipe = start_process(_serve, make, arguments, daemon=True)

    def call() -> None:
        try:
            pipe.send("go")
            count_cpu_seconds(pipe.recv())
        except (EOFError, OSError):
            process.join()
            raise UserError(f"{make.__name__}: its process died (exit code {process.exitcode}); is memory short?") from None

    try:
        yield call
    finally:
        pipe.close()
        process.join()


def _serve(pipe: Connection, make: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> None:
    work = make(*arguments)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        start = time.process_time()  # without what `make` and the imports took
        work()
        pipe.send(time.process_time() - start)


class PartFailed(Exception):
    """The function gave no result; the message says why in one line."""


def run_isolated(function: Callable[..., Any], *arguments: Any, limit_s: float, log: Path) -> Any:
    """Returns the function's result; a crash, a hang or a broken CUDA context ends only its process. Output and traceback go to the log.

    Raises UserError if the function did, and PartFailed if it raised something else, died, or ran longer than `limit_s` seconds.
    """
    process, pipe = start_process(_run, function, arguments, str(log), daemon=False)
    try:
        if not pipe.poll(limit_s):
            raise PartFailed(f"stopped at its limit of {limit_s:.0f} s; see {log.name}")
        kind, value = pipe.recv()
    except EOFError:
        process.join()
        raise PartFailed(f"its process died (exit code {process.exitcode}); see {log.name}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it leads a process group of its own: everything that it started
        process.kill()  # if it has not become a group's leader yet
        process.join()
    if kind == "user error":
        raise UserError(value)
    if kind == "failed":
        raise PartFailed(f"{value}; see {log.name}")
    return value


def _run(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], log: str) -> None:
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
