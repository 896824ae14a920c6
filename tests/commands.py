"""The project's commands, run as tests need them: in this process, in one of their own, killed, stopped, or on a full disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from unittest import mock

import torch
from torch.distributed.run import get_args_parser

from fastbyol.host.signals import COMMAND_SIGNALS
from fastbyol.run.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint

KNOWS_SHUTDOWN_TIMEOUT = "--shutdown-timeout" in get_args_parser().format_help()
"""Whether this torchrun's wait for the ranks that it ends can be set; torch 2.11's cannot, and is 30 s."""

ROOT = Path(__file__).parent.parent
DATA_PREP, SCRIPTS = ROOT / "data_prep", ROOT / "scripts"
SMALL_RUN = (
    *("--preset", "cpu_demo", "--global_batch", "8", "--log_every", "1", "--keep_checkpoints", "10"),
    *("--model.hidden_dim", "16", "--model.projection_dim", "8", "--data.workers", "1"),
)
"""A run on the 25 images of `data_paths`; 2 epochs are int(2 * 25) // 8 = 6 optimizer steps, 3 batches an epoch."""
LIMIT_S = 180.0
"""Seconds after which a process counts as hanging: it is killed and the test fails."""


def run_python(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` in a process of its own, at the repository's root; returns exit code, stdout and stderr."""
    settings: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": LIMIT_S, "check": False} | options
    return subprocess.run([sys.executable, *map(str, arguments)], **settings)


def run_here(script: str, *arguments: str | Path, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    """Runs a script of data_prep/ in this process, as `python FILE` would: a process of its own costs half a second.

    encoding: of stdout and stderr, which start as strict as Python makes them for a terminal of that encoding.
    """
    out, errors = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=how) for how in ("strict", "backslashreplace"))
    argv = [str(DATA_PREP / script), *map(str, arguments)]
    code: object = 0
    handlers = {number: signal.getsignal(number) for number in COMMAND_SIGNALS}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), mock.patch.object(sys, "argv", argv):
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert isinstance(code, int)
    for stream in (out, errors):
        stream.flush()
    return subprocess.CompletedProcess(argv, code, *(stream.buffer.getvalue().decode(encoding) for stream in (out, errors)))  # type: ignore[attr-defined]


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Simulates a full disk, even for root: inside the block, writing beyond this many bytes of a file fails with 'File too large'."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def is_alive(pid: int) -> bool:
    """Returns True if the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_of(pid: int) -> list[int]:
    """Returns the living processes that this one has started, oldest first."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [child for child in map(int, found) if is_alive(child)]


def await_gone(pids: list[int], *, timeout_s: float = LIMIT_S) -> None:
    """Waits until all of them have ended; raises AssertionError if one is still running after that time."""
    deadline = time.monotonic() + timeout_s
    while running := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, running
        time.sleep(0.02)


# ---- training


class LaunchedRun:
    """Runs `python fastbyol/train.py` (ranks 0) or torchrun with that many ranks; output goes to a file. Leaving it kills what still runs.

    fault: as in faulty_train.py, 'kind:rank:step'. script: what is run instead, a file or -m and a module with its first words.
    """

    def __init__(
        self,
        log: Path,
        *arguments: str,
        ranks: int = 0,
        launcher: tuple[str, ...] = ("--standalone",),
        fault: str = "",
        script: tuple[str, ...] = ("fastbyol/train.py",),
        env: dict[str, str] | None = None,
    ) -> None:
        self.log_file = log
        torchrun = [*("-m", "torch.distributed.run", "--nproc-per-node", str(ranks)), *launcher]
        script = ("tests/faulty_train.py",) if fault else script
        command = [sys.executable, *(torchrun if ranks else []), *script, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FAULT": fault, **(env or {})}
        with log.open("w") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait_for(self, pattern: str, *, count: int = 1) -> None:
        """Waits until the pattern occurs in the log this many times."""
        deadline = time.monotonic() + LIMIT_S
        while len(re.findall(pattern, self.log)) < count:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise AssertionError(f"{pattern!r} did not come {count} times (exit code {self.process.poll()}):\n{self.log}")
            time.sleep(0.02)

    def workers(self) -> list[int]:
        """Returns the process ids of the ranks that torchrun started, oldest first."""
        return children_of(self.process.pid)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def finish(self) -> int:
        """Returns the exit code; raises AssertionError if the process does not end."""
        try:
            return self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"hangs:\n{self.log}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        workers = self.workers()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in filter(is_alive, workers):
            os.kill(pid, signal.SIGKILL)


def state_digest(run: Path, step: int | None = None) -> str:
    """Returns a sha256 of all weights, statistics and momenta of a run's newest checkpoint, with its step: equal means bitwise equal."""
    step = step or checkpoint_steps(run)[-1]
    state = load_checkpoint(checkpoint_path(run, step))
    digest = hashlib.sha256(str(state["step"]).encode())
    for name, tensor in sorted(_tensors({"byol": state["byol"], "optimizer": state["optimizer"]["state"]}).items()):
        digest.update(name.encode() + str(tensor.dtype).encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _tensors(values: dict[Any, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key, value in values.items():
        if isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, dict):
            found |= _tensors(value, f"{prefix}{key}.")
    return found


# ---- conversion


@dataclass(frozen=True)
class Conversion:
    """One command of data_prep/, to be run as often as it takes."""

    script: str
    data: Path
    out: Path
    options: tuple[str, ...] = ()

    @property
    def work(self) -> Path:
        return self.out.with_name(f".{self.out.name}.partial")

    def done(self) -> int:
        """Returns the number of images that the journal vouches for."""
        try:
            return json.loads((self.work / "journal.json").read_text())["done"]
        except FileNotFoundError:
            return 0

    def arguments(self) -> list[str | Path]:
        return ["--data", self.data, "--out", self.out, "--flush-every", "0", *self.options]

    def run(self) -> subprocess.CompletedProcess[str]:
        return run_here(self.script, *self.arguments())

    def interrupt(self, number: signal.Signals, *, after: int, pause_s: float = 0.0) -> tuple[int, str, list[int]]:
        """Sends a signal when so many images are done and a pause is over; returns exit code, stderr and the workers that there were."""
        command = [sys.executable, DATA_PREP / self.script, *self.arguments()]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while self.done() < after and process.poll() is None:
            time.sleep(0.002)
        time.sleep(pause_s)
        workers = children_of(process.pid)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        return process.returncode, err, workers

    def result(self) -> dict[str, bytes]:
        """Returns every file that the conversion left, by name."""
        files = self.out.rglob("*") if self.out.is_dir() else self.out.parent.glob(f"{self.out.name}*")
        return {path.name: path.read_bytes() for path in files if path.is_file()}

    def is_finished(self) -> bool:
        return self.out.exists() and not self.work.exists()


CONVERSIONS: dict[str, Callable[..., Conversion]] = {
    "beton": lambda data, folder, *options: Conversion("to_ffcv.py", data, folder / "x.beton", options),
    "tar": lambda data, folder, *options: Conversion("to_dali.py", data, folder / "x", ("--shard-mb", "1", *options)),
}
"""The command of each format: (images, folder of the output, more options)."""


def kill_and_continue(conversion: Conversion, *, images: int, kills: int, seed: int) -> list[int]:
    """Kills the command at random moments, spread over its work, and continues it to its end; returns what the journal said at each kill."""
    moments = random.Random(seed)
    done_at_kill = []
    for kill in range(kills):
        after = round(0.7 * images * (kill + moments.random()) / kills)
        code, _, workers = conversion.interrupt(signal.SIGKILL, after=after, pause_s=moments.random() * 0.03)
        if code != -signal.SIGKILL or not conversion.work.exists():  # it was done before the moment came
            break
        done_at_kill.append(conversion.done())
        await_gone(workers)
    was_in_place = conversion.out.exists()
    if not conversion.is_finished():
        finished = conversion.run()
        # Killed when the output had just taken its place, there is nothing to do but to remove the work folder.
        assert finished.returncode == (2 if was_in_place else 0), finished.stderr
        assert conversion.is_finished()
    return done_at_kill
