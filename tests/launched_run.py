"""Starts a training run in processes of its own, as a user does, so that tests can disturb and inspect it from outside."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import torch

from fastbyol.run.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint

ROOT = Path(__file__).parent.parent
TINY = (
    *("--preset", "cpu_demo", "--global_batch", "8", "--log_every", "1", "--model.hidden_dim", "16", "--model.projection_dim", "8"),
    *("--data.workers", "1", "--views.size_px", "32"),
)
LIMIT_S = 180.0
"""Seconds after which a process counts as hanging: it is killed and the test fails."""


class LaunchedRun:
    """Runs `python fastbyol/train.py` (ranks 0) or torchrun with that many ranks; output goes to a file. Leaving it kills what still runs.

    fault: as in faulty_train.py, 'kind:rank:step'.
    """

    def __init__(
        self,
        log: Path,
        *arguments: str,
        ranks: int = 0,
        launcher: tuple[str, ...] = ("--standalone",),
        fault: str = "",
        env: dict[str, str] | None = None,
    ) -> None:
        self.log_file = log
        torchrun = [*("-m", "torch.distributed.run", "--nproc-per-node", str(ranks)), *launcher]
        script = "tests/faulty_train.py" if fault else "fastbyol/train.py"
        command = [sys.executable, *(torchrun if ranks else []), script, *arguments]
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
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        return [pid for pid in found if is_alive(pid)]

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
        for pid in workers:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Returns True if the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


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
            found[f"{prefix}{key}"] = value.reshape(1) if value.dim() == 0 else value
        elif isinstance(value, dict):
            found |= _tensors(value, f"{prefix}{key}.")
    return found
