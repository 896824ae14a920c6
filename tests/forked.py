"""Python processes that start in a tenth of a second: forks of a server that has imported torch and the package, which takes seconds.

For tests of what one process or several do once they run: ranks, kills, signals. How a process starts is for `run_python` and `LaunchedRun`
in commands.py.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from tests.commands import LIMIT_S, ROOT

# What a training or an evaluation imports sooner or later. The server takes this list when it starts, so it is the same for all tests.
multiprocessing.set_forkserver_preload(
    ["pytest", "torch._dynamo", "torch.distributed.nn.functional", "fastbyol.train", "fastbyol.evaluation.embedding", "fastbyol.commands"]
)
_SERVER = multiprocessing.get_context("forkserver")


class ForkedPython:
    """Runs `python ARGUMENTS` at the repository's root: a file, -m and a module, or -c and code, then its words. Output goes to two files.

    Like a subprocess.Popen with a session of its own: pid, poll, wait, send_signal, kill. Leaving it kills it.

    env: what is added to the environment.
    """

    def __init__(self, *arguments: str | Path, out: Path, err: Path, env: dict[str, str] | None = None) -> None:
        self.process = _SERVER.Process(target=_python, args=([*map(str, arguments)], {**os.environ, **(env or {})}, str(out), str(err)))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        """Returns the exit code, or minus the signal that ended it; None while it runs."""
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.process), timeout or 0.0)
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> ForkedPython:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.process.join()


def run_forked(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` as ForkedPython does; returns exit code, stdout and stderr."""
    (done,) = _run(arguments, [env or {}])
    return done


def run_ranks(*arguments: str | Path, ranks: int = 2, env: dict[str, str] | None = None) -> list[subprocess.CompletedProcess[str]]:
    """Runs `python ARGUMENTS` once for each rank, with the environment that torchrun would give it; returns what `run_forked` does for each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return _run(arguments, [{**(env or {}), **group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)])


def start_ranks(function: Callable[..., None], *arguments: Any, ranks: int = 2) -> None:
    """Calls function(rank, *arguments) in a process for each rank and waits for them; raises what one of them raised."""
    mp.start_processes(function, args=arguments, nprocs=ranks, start_method="forkserver")


def _run(arguments: tuple[str | Path, ...], environments: list[dict[str, str]]) -> list[subprocess.CompletedProcess[str]]:
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder, f"out{place}"), Path(folder, f"err{place}")) for place in range(len(environments))]
        processes = [ForkedPython(*arguments, out=out, err=err, env=env) for (out, err), env in zip(files, environments, strict=True)]
        try:
            codes = [process.wait(LIMIT_S) for process in processes]
        except subprocess.TimeoutExpired as error:
            for place, (process, (_, err)) in enumerate(zip(processes, files, strict=True)):
                error.add_note(f"process {place}, exit code {process.poll()}, said last: {err.read_text(errors='replace')[-2000:]}")
            raise
        finally:
            for process in processes:
                process.kill()
        texts = [[file.read_text(errors="replace") for file in pair] for pair in files]
    return [subprocess.CompletedProcess(list(arguments), code, *text) for code, text in zip(codes, texts, strict=True)]


def _python(arguments: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """Does what the interpreter does with this command line, in this process."""
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, file in ((1, out), (2, err)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    try:
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(arguments[1], {"__name__": "__main__"})
        elif arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing's own processes leave them out
