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

PEAK = "MiB at its peak"
"""Name of the figure that `OwnProcess.peak_mib` gives."""


def start_process(serve: Callable[..., None], *arguments: Any, daemon: bool, method: str = "spawn") -> tuple[Any, Connection]:
    """Starts a process that runs `serve(pipe, *arguments)` until the pipe is closed; returns it with the other end. daemon: may start none itself."""
    # Never forked from here: a forked child cannot use CUDA once the parent has initialised it.
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, *arguments), daemon=daemon)
    process.start()
    theirs.close()  # while a copy of it is open here, the death of the process is no end of file
    return process, ours


class OwnProcess:
    """Calls work in the other process. Its CPU time counts as if spent here."""

    def __init__(self, name: str, process: Any, pipe: Connection) -> None:
        self._name, self._process, self._pipe = name, process, pipe

    def __call__(self) -> None:
        count_cpu_seconds(self._ask("work"))

    def peak_mib(self) -> float:
        """Returns the most memory that the process has had so far, in MiB: libraries, networks, and all that a step needs."""
        return self._ask("peak")

    def _ask(self, what: str) -> float:
        try:
            self._pipe.send(what)
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise UserError(f"{self._name}: its process died (exit code {self._process.exitcode}); is memory short?") from None


@contextlib.contextmanager
def in_own_process(make: Callable[..., Callable[[], object]], *arguments: Any) -> Iterator[OwnProcess]:
    """Yields what calls `make(*arguments)()`, made once, in the other process."""
    # Forked from a server that has imported torch and done nothing else: a process of each row costs no import.
    multiprocessing.set_forkserver_preload(["benchmarks.training_step"])
    process, pipe = start_process(_serve, make, arguments, daemon=True, method="forkserver")
    try:
        yield OwnProcess(make.__name__, process, pipe)
    finally:
        pipe.close()
        process.join()


def peak_mib_of(make: Callable[..., Callable[[], object]], *arguments: Any, calls: int = 3) -> float:
    """Returns the peak memory in MiB of a process of its own that calls `make(*arguments)()` a few times: the first call allocates state."""
    with in_own_process(make, *arguments) as work:
        for _ in range(calls):
            work()
        return work.peak_mib()


def _serve(pipe: Connection, make: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> None:
    work = make(*arguments)
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        if asked == "peak":
            pipe.send(_peak_mib())
            continue
        start = time.process_time()  # without what `make` and the imports took
        work()
        pipe.send(time.process_time() - start)


def _peak_mib() -> float:
    # Not getrusage's ru_maxrss: a process inherits that from the one that started it.
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


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
