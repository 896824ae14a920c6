"""Checkpoints that are whole or not there: one file per step, written under a temporary name, with a digest of its own.

A flipped bit loads without an error in torch.load, hence the digest; files travel, hence `weights_only=True` and plain types inside.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastbyol.config.errors import UserError
from fastbyol.config.plain import from_plain
from fastbyol.config.schema import TrainConfig

log = logging.getLogger("fastbyol")
FOLDER = "checkpoints"
_NAME = re.compile(r"^step-(\d{9})\.pt$")


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


def save_checkpoint(run: Path, *, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes the state after `step` optimizer steps; afterwards the newest `keep` files stay.

    Raises:
        CheckpointError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    path = checkpoint_path(run, step)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Digest first: a checkpoint without its digest never exists.
        _write_durably(_digest_path(path), hashlib.sha256(payload).hexdigest().encode() + b"\n")
        _write_durably(path, payload)
    except OSError as error:
        needed = f"{len(payload) / 1e6:.0f} MB"
        raise CheckpointError(
            f"checkpoint {path} ({needed}): {error.strerror}; make room or choose another --out. Earlier checkpoints are untouched: {checkpoint_steps(run)}"
        ) from error
    for old in checkpoint_steps(run)[:-keep]:
        checkpoint_path(run, old).unlink()
        _digest_path(checkpoint_path(run, old)).unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in one file, on the CPU, checked against its digest.

    Raises:
        CheckpointError: missing, truncated, altered, or holding more than tensors and plain values.
    """
    try:
        payload, digest = path.read_bytes(), _digest_path(path).read_text().strip()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: {error.filename} cannot be read ({error.strerror})") from error
    if hashlib.sha256(payload).hexdigest() != digest:
        raise CheckpointError(f"checkpoint {path} ({len(payload)} bytes): truncated or altered, its sha256 is not the recorded one")
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"checkpoint {path}: not a checkpoint of fastbyol ({str(error).splitlines()[0][:120]})") from error


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


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _write_durably(path: Path, payload: bytes | memoryview) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
