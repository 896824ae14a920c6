"""Checkpoints that are whole or not there: one file per step, written under a temporary name, with a digest of its own.

A flipped bit loads without an error in torch.load, hence the digest; files travel, hence `weights_only=True` and plain types inside.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, cast

import torch

from fastbyol.config.errors import UserError
from fastbyol.config.plain import from_plain
from fastbyol.config.schema import TrainConfig

log = logging.getLogger("fastbyol")
FOLDER = "checkpoints"
REQUIRED = ("step", "config", "byol")
"""What every checkpoint holds, whatever else its reader needs."""
_NAME = re.compile(r"^step-(\d{9})\.pt$")
_PIECE_BYTES = 4 << 20


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or is not what was written."""


@dataclass(frozen=True)
class RunState:
    """A run read back: its config, the newest good checkpoint's state and step, its folder."""

    config: TrainConfig
    state: dict[str, Any]
    step: int
    folder: Path


def checkpoint_path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:09d}.pt"


def checkpoint_steps(run: Path) -> list[int]:
    """Steps that have a checkpoint file, ascending."""
    folder = run / FOLDER
    return sorted(int(m[1]) for f in (folder.iterdir() if folder.is_dir() else ()) if (m := _NAME.match(f.name)))


def save_checkpoint(run: Path, *, step: int, state: dict[str, Any], keep: int, stays: Callable[[int], bool] = lambda step: False) -> Path:
    """Writes the state after `step` optimizer steps, durably; afterwards the newest `keep` files stay, and those whose step `stays`.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    path = checkpoint_path(run, step)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_durably(path, state)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} ({_megabytes(state):.0f} MB, {_free_megabytes(run):.0f} MB free): {error.strerror}; "
            f"make room or choose another --out. Earlier checkpoints are untouched: {checkpoint_steps(run)}"
        ) from error
    for old in [s for s in checkpoint_steps(run)[:-keep] if not stays(s)]:
        checkpoint_path(run, old).unlink()
        _digest_path(checkpoint_path(run, old)).unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in one file, on the CPU, checked against its digest.

    Raises:
        CheckpointError: missing, truncated, altered, holding more than tensors and plain values, or of another program.
    """
    try:
        payload, digest = path.read_bytes(), _digest_path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint {path}: it or its .sha256 cannot be read ({error})") from error
    if hashlib.sha256(payload).hexdigest() != digest:
        raise CheckpointError(f"checkpoint {path} ({len(payload)} bytes): truncated or altered, its sha256 is not the recorded one")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"checkpoint {path}: not a checkpoint of fastbyol ({why_not_loaded(error)})") from error
    if not isinstance(state, dict) or not set(REQUIRED) <= set(state):
        raise CheckpointError(f"checkpoint {path}: not a checkpoint of fastbyol (it has no {', '.join(REQUIRED)})")
    return state


def why_not_loaded(error: Exception) -> str:
    """What torch.load means, in a few words: its own text advises to load the file all the same."""
    if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it asks for {wanted[1]}, and only tensors and plain values are read"
    if isinstance(error, UnpicklingError | EOFError):
        return "torch.save did not write it"
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def load_newest(run: Path) -> dict[str, Any] | None:
    """The state of the newest good checkpoint of a run folder, None where there is none yet; a damaged one is named and passed over.

    Raises:
        CheckpointError: there are checkpoints and all are damaged.
    """
    steps = checkpoint_steps(run)
    for step in reversed(steps):
        try:
            return load_checkpoint(checkpoint_path(run, step))
        except CheckpointError as error:
            log.warning("%s; trying the one before", error)
    if steps:
        raise CheckpointError(f"{run / FOLDER}: all {len(steps)} checkpoints are damaged; start anew with another --out")
    return None


def load_run(path: str | Path) -> RunState:
    """A run from its folder (newest good checkpoint) or from one checkpoint file.

    Raises:
        UserError: no such path, or nothing to load there.
    """
    path = Path(path)
    if path.is_dir():
        state = load_newest(path)
        if state is None:
            raise UserError(f"checkpoint = {str(path)!r}: no checkpoints/step-*.pt in it; give a run folder or a checkpoint file")
        folder = path
    elif path.is_file():
        state, folder = load_checkpoint(path), path.parent.parent
    else:
        raise UserError(f"checkpoint = {str(path)!r}: no such file or folder; give a run folder or a checkpoint file")
    return RunState(config=from_plain(TrainConfig, state["config"]), state=state, step=state["step"], folder=folder)


def check_resume(config: TrainConfig) -> None:
    """Holds `resume` against what the run's folder has; torchrun's own restarts continue in any case.

    Raises:
        UserError: 'must' without a checkpoint, 'never' with one.
    """
    steps = checkpoint_steps(Path(config.out))
    if config.resume == "must" and not steps:
        raise UserError(f"resume = 'must': {config.out} holds no checkpoint; leave it out to start the run")
    restarted = any((os.environ.get(name) or "0") != "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    if config.resume == "never" and steps and not restarted:
        raise UserError(
            f"resume = 'never': {config.out} holds a run of {steps[-1]} steps; choose another --out, or leave it out to continue"
        )


def sweep_unfinished(run: Path) -> None:
    """Removes what a process that was killed while writing left behind. For the one process that writes here."""
    folder = run / FOLDER
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if ".tmp-" in path.name:
            log.info("ignoring unfinished file %s", path)
            path.unlink()
        elif path.suffix == ".sha256" and not path.with_suffix(".pt").exists():
            path.unlink()


class _DigestingFile(io.RawIOBase):
    """Writes through to a file, with the sha256 of all that went by; keeps the error that torch's zip writer swallows."""

    def __init__(self, file: io.RawIOBase | io.FileIO) -> None:
        self._file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            # In pieces: each gives the interpreter back to the training step meanwhile.
            for start in range(0, len(view), _PIECE_BYTES):
                self._write_whole(view[start : start + _PIECE_BYTES])
        except OSError as error:
            self.error = error
            raise
        return len(view)

    def _write_whole(self, piece: memoryview) -> None:
        self.digest.update(piece)
        while piece:
            piece = piece[self._file.write(piece) or 0 :]


def _write_durably(path: Path, state: dict[str, Any]) -> None:
    """The state and its digest: both flushed to the disk under temporary names, then renamed, the digest first."""
    unfinished = [p.with_name(f"{p.name}.tmp-{os.getpid()}") for p in (path, _digest_path(path))]
    try:
        with unfinished[0].open("wb", buffering=0) as file:
            through = _DigestingFile(file)
            try:
                torch.save(state, cast(IO[bytes], through))
            except RuntimeError as error:
                raise through.error or error from error
            os.fsync(file.fileno())
        with unfinished[1].open("w") as file:
            file.write(through.digest.hexdigest() + "\n")
            file.flush()
            os.fsync(file.fileno())
        # A checkpoint without its digest never exists.
        unfinished[1].replace(_digest_path(path))
        unfinished[0].replace(path)
    finally:
        for temporary in unfinished:
            temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _megabytes(state: Any) -> float:
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size() / 1e6
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(_megabytes(value) for value in values)


def _free_megabytes(folder: Path) -> float:
    try:
        return shutil.disk_usage(folder).free / 1e6
    except OSError:
        return 0.0
