"""Runs work in a process of its own, where what it does to memory, torch's settings or the GPU disturbs nothing else."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.timing import count_cpu_seconds
from fastbyol.config.errors import UserError

PEAK = "MiB at its peak"
"""Name of the figure that `OwnProcess.peak_mib` gives."""


def start_process(serve: Callable[..., None], *arguments: Any, daemon: bool, method: str = "spawn") -> tuple[Any, Connection]:
    """Starts a process that runs `serve(pipe, *arguments)` until the pipe is closed; returns it with the other end. daemon: may start none itself."""
    # Never forked from here: a forked child cannot use CUDA once the parent has initialised it. The server of "forkserver" has imported torch
    # and done nothing else: a process costs no import. An optimizer imports torch._dynamo at its first step.
    if method == "forkserver":
        multiprocessing.set_forkserver_preload(["benchmarks.training_step", "torch._dynamo"])
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


class Isolated:
    """A process that calls functions one after another: a crash, a hang or a broken CUDA context ends only it, and the next call has a new one.

    Loading torch and starting CUDA take ten seconds, which only the first call and those after a failure pay. Output and tracebacks go to
    the log.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._running: tuple[Any, Connection] | None = None
        log.write_bytes(b"")

    def call(self, function: Callable[..., Any], *arguments: Any, limit_s: float, kept: Callable[[Any], object] = lambda _: None) -> Any:
        """Returns the function's result, or that of a generator's last step, whose results `kept` gets one by one as they come.

        Raises UserError if the function did, and PartFailed if it raised something else, died, or ran longer than `limit_s` seconds.
        """
        if self._running is None:
            self._running = start_process(_serve_calls, str(self._log), daemon=False)
        process, pipe = self._running
        deadline, failed = time.monotonic() + limit_s, True
        try:
            pipe.send((function, arguments))
            while True:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise PartFailed(f"stopped at its limit of {limit_s:.0f} s; see {self._log.name}")
                kind, value = pipe.recv()
                failed = kind == "failed"
                if kind != "kept":
                    break
                kept(value)
                failed = True
        except (EOFError, OSError):
            process.join()
            raise PartFailed(f"its process died (exit code {process.exitcode}); see {self._log.name}") from None
        finally:
            if failed:
                self.close()
        if kind == "user error":
            raise UserError(value)
        if kind == "failed":
            raise PartFailed(f"{value}; see {self._log.name}")
        return value

    def close(self) -> None:
        """Ends the process, if there is one, and everything that it started."""
        if self._running is None:
            return
        process, pipe = self._running
        self._running = None
        pipe.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it leads a process group of its own
        process.kill()  # if it has not become a group's leader yet
        process.join()


def _serve_calls(pipe: Connection, log: str) -> None:
    os.setsid()  # so that the compiler's workers can be killed with it
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            result = function(*arguments)
            if isinstance(result, Generator):
                steps, result = result, None
                for result in steps:
                    pipe.send(("kept", result))
            pipe.send(("result", result))
        except UserError as error:
            pipe.send(("user error", str(error)))
        except BaseException as error:
            traceback.print_exc()
            pipe.send(("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        sys.stdout.flush()
