"""Checkpoints that are whole or not there: one file per step, written under a temporary name, with a digest of its own.

A flipped bit loads without an error in torch.load, hence the digest; files travel, hence `weights_only=True` and plain types inside, and
what comes out is held against what this program writes before anything uses it.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, cast

import torch

from fastbyol.config.errors import UserError, shown
from fastbyol.config.plain import from_plain
from fastbyol.config.schema import TrainConfig
from fastbyol.durable_files import UNFINISHED, durable_file, write_durably
from fastbyol.run_folder import CONFIG_FILE, config_changes, read_config, write_config
from fastbyol.saved_structure import is_count

log = logging.getLogger("fastbyol")
FOLDER = "checkpoints"
RESULTS = "evaluation"
"""Of a run, the folder of its figures; of a checkpoint file elsewhere, the ending of one beside it."""
REQUIRED = ("step", "config", "byol")
"""What every checkpoint holds, whatever else its reader needs."""
_NAME = re.compile(r"^step-(\d{9})\.pt$")
_PIECE_BYTES = 4 << 20
_UNPACKED_FREELY, _MOST_UNPACKED = 64 << 20, 4
"""A file of weights may unpack to this many bytes, or to so many times its size: torch.save itself packs nothing."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or is not what was written."""


@dataclass(frozen=True)
class RunState:
    """A run read back: its config, the newest good checkpoint's state and step, its folder, and where what is found out about it belongs."""

    config: TrainConfig
    state: dict[str, Any]
    step: int
    folder: Path
    results: Path


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
    # Files of later steps were passed over when this run was continued: they take no place from good ones.
    for old in [s for s in [s for s in checkpoint_steps(run) if s <= step][:-keep] if not stays(s)]:
        checkpoint_path(run, old).unlink()
        _digest_path(checkpoint_path(run, old)).unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in one file, on the CPU, checked against its digest; without one, against the checksums inside, which is said.

    Raises:
        CheckpointError: missing, truncated, altered, holding more than tensors and plain values, or of another program.
    """
    if path.exists() and not path.is_file():  # to read a named pipe would wait for ever
        raise CheckpointError(f"checkpoint {path}: is not a file")
    try:
        payload = path.read_bytes()
        recorded = _digest_path(path).read_bytes().strip() if _digest_path(path).exists() else b""
        digest = recorded.decode() if re.fullmatch(rb"[0-9a-f]{64}", recorded) else None  # an interrupted copy left none
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: it or its .sha256 cannot be read ({error})") from error
    if digest is not None and hashlib.sha256(payload).hexdigest() != digest:
        raise CheckpointError(
            f"checkpoint {path} ({len(payload)} bytes): truncated or altered, its sha256 is not the recorded one "
            f"(if {_digest_path(path).name} belongs to another file, remove that)"
        )
    try:
        if digest is None and (broken := zipfile.ZipFile(io.BytesIO(payload)).testzip()):
            raise ValueError(f"damaged at {broken}")
        state = load_weights(io.BytesIO(payload))
        _refuse_other_structure(state, path)
    except Exception as error:
        raise CheckpointError(f"checkpoint {path}: not a checkpoint of fastbyol ({why_not_loaded(error)})") from error
    if digest is None:
        log.warning("checkpoint %s has no sha256 in a file beside it; its own checksums are right, so it is used", path)
    return state


def load_weights(file: IO[bytes]) -> Any:
    """What torch.load reads, tensors and plain values only, on the CPU. ValueError where it would unpack to far more than the file holds."""
    held = file.seek(0, os.SEEK_END)
    allowed = max(_UNPACKED_FREELY, _MOST_UNPACKED * held)
    file.seek(0)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            held = sum(entry.file_size for entry in archive.infolist())
        if held > allowed:
            raise ValueError(f"it would unpack to {held / 1e9:.1f} GB, {allowed / 1e9:.1f} GB are allowed for its size")
    file.seek(0)
    state = torch.load(file, map_location="cpu", weights_only=True)
    # torch makes a storage larger where a tensor asks for more than the file has, out of whatever lies in memory.
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(state)}
    if sum(stored.values()) > held:
        raise ValueError(f"its tensors want {sum(stored.values())} bytes, it holds {held}")
    return state


def _tensors(state: Any) -> list[torch.Tensor]:
    """The tensors in nested dicts and lists, once each however often they are named."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()
    left = [state]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_meta:
                raise ValueError(f"it holds a {'meta' if value.is_meta else value.layout} tensor, and only plain ones are read")
            found.append(value)
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
    return found


def _refuse_other_structure(state: Any, path: Path) -> None:
    """ValueError unless the state has what every checkpoint holds, in its types, and the step is that of the file's name."""
    if not isinstance(state, dict) or not set(REQUIRED) <= set(state):
        raise ValueError(f"it has no {', '.join(REQUIRED)}")
    if not is_count(state["step"]):
        raise ValueError(f"its step is {shown(state['step'])}")
    if (name := _NAME.match(path.name)) and int(name[1]) != state["step"]:
        raise ValueError(f"it holds step {state['step']}, its name says {int(name[1])}")
    weights = state["byol"]
    if not isinstance(weights, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()):
        raise ValueError("its networks are not tensors by name")
    from_plain(TrainConfig, state["config"], where="config.")


def why_not_loaded(error: Exception) -> str:
    """What torch.load means, in a few words: its own text advises to load the file all the same."""
    if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it asks for {wanted[1]}, and only tensors and plain values are read"
    if isinstance(error, UnpicklingError | EOFError):
        return "torch.save did not write it"
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def load_newest(
    run: Path, *, config: TrainConfig | None = None, check: Callable[[dict[str, Any]], str | None] = lambda state: None
) -> dict[str, Any] | None:
    """The state of the newest good checkpoint of a run folder, None where there is none yet; one that is not good is named and passed over.

    Args:
        run: the folder.
        config: the run's; None takes what the folder holds. A checkpoint with another one is not of this run.
        check: says what else is wrong with a state, or None.

    Raises:
        CheckpointError: there are checkpoints and none is good.
    """
    steps = checkpoint_steps(run)
    config = config or (_recorded_config(run) if steps else None)
    reasons = []
    for step in reversed(steps):
        path = checkpoint_path(run, step)
        try:
            state = load_checkpoint(path)
            if config and (changes := config_changes(from_plain(TrainConfig, state["config"]), config)):
                raise CheckpointError(f"checkpoint {path}: is of a run with another config ({'; '.join(changes[:5])})")
            if wrong := check(state):
                raise CheckpointError(f"checkpoint {path}: is not one of this run ({wrong})")
            return state
        except CheckpointError as error:
            reasons.append(str(error))
            log.warning("%s%s", error, "; trying the one before" if step != steps[0] else "")
    if steps:
        raise CheckpointError(
            f"{run / FOLDER}: all {len(steps)} checkpoints are damaged or of another run; start anew with another --out (the newest: {reasons[0]})"
        )
    return None


def _recorded_config(run: Path) -> TrainConfig | None:
    try:
        return read_config(run)
    except UserError:
        return None


def mend_config(run: Path) -> None:
    """Writes a config.yaml that is missing or cannot be read anew, from the newest good checkpoint, if there is one.

    Raises:
        CheckpointError: there are checkpoints and none is good.
        UserError: the folder cannot be written.
    """
    try:
        if not checkpoint_steps(run) or _recorded_config(run):
            return
    except OSError:  # a folder that cannot be used, as will be said
        return
    state = load_newest(run)
    assert state is not None
    path = run / CONFIG_FILE
    try:
        if path.exists() and path.stat().st_size:
            path.replace(path.with_name(f"{CONFIG_FILE}.damaged"))
        write_config(run, from_plain(TrainConfig, state["config"]))
    except OSError as error:
        raise UserError(f"{path}: cannot be read, nor written anew ({error.strerror}); choose another --out") from error
    log.warning("%s could not be read; it is written anew from the checkpoint after step %d", path, state["step"])


def load_run(path: str | Path) -> RunState:
    """A run from its folder (newest good checkpoint) or from one checkpoint file, which may lie anywhere.

    Raises:
        UserError: no such path, or nothing to load there.
    """
    path = Path(path)
    if path.is_dir():
        state = load_newest(path)
        if state is None:
            raise UserError(f"checkpoint = {str(path)!r}: no checkpoints/step-*.pt in it; give a run folder or a checkpoint file")
        folder, results = path, path / RESULTS
    elif path.is_file():
        state, folder, results = load_checkpoint(path), path.parent, path.with_name(f"{path.stem}.{RESULTS}")
        if _NAME.match(path.name) and path.parent.name == FOLDER and (path.parent.parent / CONFIG_FILE).exists():
            folder, results = path.parent.parent, path.parent.parent / RESULTS
    else:
        raise UserError(f"checkpoint = {str(path)!r}: no such file or folder; give a run folder or a checkpoint file")
    config = from_plain(TrainConfig, state["config"])
    return RunState(config=config, state=state, step=state["step"], folder=folder, results=results)


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
        if UNFINISHED in path.name:
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
    """The state, and before it gets its name the digest: a checkpoint of ours is without one only where somebody has left it behind."""
    with durable_file(path) as file:
        through = _DigestingFile(cast(io.RawIOBase, file))
        try:
            torch.save(state, cast(IO[bytes], through))
        except RuntimeError as error:
            raise through.error or error from error
        os.fsync(file.fileno())
        write_durably(_digest_path(path), through.digest.hexdigest() + "\n")


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
