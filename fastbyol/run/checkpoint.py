"""Checkpoints: one file per step, written under a temporary name and renamed when complete, with a sha256 file beside it.

torch.load does not notice a flipped bit, hence the digest. Checkpoints are shared between machines, hence `weights_only=True` and
plain types inside; everything read is compared with what this program writes before it is used.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, cast

import torch

from fastbyol.config.errors import NotSaved, UserError, first_line, shown
from fastbyol.config.plain import from_plain
from fastbyol.config.schema import TrainConfig
from fastbyol.host.durable_files import UNFINISHED, durable_file, write_durably
from fastbyol.host.quantities import bytes_text
from fastbyol.host.saved_structure import is_count
from fastbyol.run.folder import CONFIG_FILE, config_changes, read_config, write_config

log = logging.getLogger("fastbyol")
FOLDER = "checkpoints"
RESULTS = "evaluation"
"""Name of the folder of results in a run folder, and suffix of the one beside a checkpoint file that is stored elsewhere."""
REQUIRED = ("step", "config", "byol")
"""Keys that every checkpoint has; `train_state` needs more to continue a run."""
_NAME = re.compile(r"^step-(\d{9})\.pt$")
_PIECE_BYTES = 4 << 20
_UNPACKED_FREELY, _MOST_UNPACKED = 64 << 20, 4
"""A weights file may unpack to this many bytes, or to this many times its size, whichever is more: torch.save itself does not compress."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, or is not what was written."""


@dataclass(frozen=True)
class RunState:
    """A run read back from disk: its config and newest good checkpoint, the run folder, and the folder of its evaluation results."""

    config: TrainConfig
    state: dict[str, Any]
    step: int
    folder: Path
    results: Path
    title: str = "BYOL"
    """What its encoder is called in tables: another program's weights are not BYOL's."""


def checkpoint_path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:09d}.pt"


def checkpoint_steps(run: Path) -> list[int]:
    """Returns the steps that have a checkpoint file, ascending."""
    folder = run / FOLDER
    return sorted(int(m[1]) for f in (folder.iterdir() if folder.is_dir() else ()) if (m := _NAME.match(f.name)))


def require_room(run: Path, weights: dict[str, Any]) -> None:
    """Raises NotSaved if the disk cannot hold even these weights, to which a checkpoint adds the optimizer's state."""
    try:
        disk = shutil.disk_usage(run)
    except OSError:
        return
    needed = sum(tensor.nbytes for tensor in _tensors(weights))
    if disk.total and needed > disk.free:  # some file systems know neither
        raise NotSaved(
            f"--out {run}: a checkpoint takes more than {bytes_text(needed)}, and its disk has {bytes_text(disk.free)} free; make room, or choose another"
        )


def save_checkpoint(run: Path, *, step: int, state: dict[str, Any], keep: int, stays: Callable[[int], bool] = lambda step: False) -> Path:
    """Writes the state after `step` optimizer steps durably, then deletes checkpoints but the newest `keep` and those whose step `stays`.

    Raises CheckpointError if the disk is full or not writable; earlier checkpoints are untouched then.
    """
    path = checkpoint_path(run, step)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_durably(path, state)
    except OSError as error:
        needed = sum(tensor.nbytes for tensor in _tensors(state)) / 1e6
        way_out = "raise the limit on the size of files (ulimit -f)" if error.errno == errno.EFBIG else "make room or choose another --out"
        kept = ", ".join(str(other) for other in checkpoint_steps(run) if other != step)
        raise CheckpointError(
            f"checkpoint {path} ({needed:.0f} MB, {_free_megabytes(run):.0f} MB free): {error.strerror}; {way_out}. "
            + (f"The checkpoints after steps {kept} are untouched" if kept else "The run has no other checkpoint")
        ) from error
    # Files of later steps were skipped as damaged when the run was resumed, so they do not count towards `keep`.
    for old in [s for s in [s for s in checkpoint_steps(run) if s <= step][:-keep] if not stays(s)]:
        # The checkpoint first: a crash in between leaves a lone digest, which is swept, not a checkpoint without its digest.
        checkpoint_path(run, old).unlink()
        digest_path(checkpoint_path(run, old)).unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path, *, or_weights: bool = False) -> Any:
    """Loads the state in one file on the CPU, after checking its digest; without one the zip checksums are checked, with a warning.

    Args:
        path: the file.
        or_weights: without a digest, also return whatever plain values and tensors another program saved.

    Raises:
        CheckpointError: missing, truncated, altered, holds more than tensors and plain values, or was written by another program.
    """
    if path.exists() and not path.is_file():  # to read a named pipe would wait for ever
        raise CheckpointError(f"checkpoint {path}: is not a file")
    try:
        payload = path.read_bytes()
        recorded = digest_path(path).read_bytes().strip() if digest_path(path).exists() else b""
        digest = recorded.decode() if re.fullmatch(rb"[0-9a-f]{64}", recorded) else None  # an interrupted copy left none
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: it or its .sha256 cannot be read ({error})") from error
    if digest is not None and hashlib.sha256(payload).hexdigest() != digest:
        raise CheckpointError(
            f"checkpoint {path} ({len(payload)} bytes): truncated or altered, its sha256 is not the recorded one "
            f"(if {digest_path(path).name} belongs to another file, remove that)"
        )
    foreign = or_weights and digest is None
    try:
        state = load_weights(io.BytesIO(payload))
        if foreign and not (isinstance(state, dict) and set(REQUIRED) <= state.keys()):
            return state
        # torch.load itself does not compare the archive's checksums.
        if digest is None and (broken := zipfile.ZipFile(io.BytesIO(payload)).testzip()):
            raise ValueError(f"damaged at {broken}")
        _refuse_other_structure(state, path)
    except Exception as error:
        what = "a file of weights" if foreign else "a checkpoint of fastbyol"
        raise CheckpointError(f"checkpoint {path}: is not {what} ({_why_not_loaded(error, payload)})") from error
    if digest is None:
        log.warning("checkpoint %s has no valid .sha256 beside it; its internal checksums match, so it is used", path)
    return state


def unpacked_size(file: IO[bytes]) -> int:
    """Returns the bytes that a file holds once unpacked; leaves it at its start. Raises ValueError if they are far more than the file."""
    held = file.seek(0, os.SEEK_END)
    allowed = max(_UNPACKED_FREELY, _MOST_UNPACKED * held)
    file.seek(0)
    # The sizes are checked before anything is unpacked: a few kilobytes of zip can expand to terabytes.
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            held = sum(entry.file_size for entry in archive.infolist())
        if held > allowed:
            raise ValueError(f"it would unpack to {held / 1e9:.1f} GB, but only {allowed / 1e9:.1f} GB are allowed for its size")
    file.seek(0)
    return held


def load_weights(file: IO[bytes]) -> Any:
    """Returns the tensors and plain values in a file of torch.save, on the CPU. Raises ValueError if they unpack to far more than the file."""
    held = unpacked_size(file)
    state = torch.load(file, map_location="cpu", weights_only=True)
    # If a tensor asks for more bytes than the file holds, torch enlarges the storage with uninitialised memory.
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(state)}
    if sum(stored.values()) > held:
        raise ValueError(f"its tensors need {sum(stored.values())} bytes, but it holds {held}")
    return state


def _tensors(state: Any) -> list[torch.Tensor]:
    """Returns the tensors in nested dicts and lists, each once even if it is referenced several times."""
    # A loop, not recursion, and each object once: a hostile file may nest deeply or contain itself.
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
                raise ValueError(f"it holds a {'meta' if value.is_meta else value.layout} tensor, but only plain ones are accepted")
            found.append(value)
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
    return found


def _refuse_other_structure(state: Any, path: Path) -> None:
    """Raises ValueError unless the state has the keys and types of every checkpoint and its step matches the file name."""
    if not isinstance(state, dict) or not set(REQUIRED) <= set(state):
        raise ValueError(f"it has no {', '.join(REQUIRED)}")
    if not is_count(state["step"]):
        raise ValueError(f"its step is {shown(state['step'])}")
    if (name := _NAME.match(path.name)) and int(name[1]) != state["step"]:
        raise ValueError(f"it holds step {state['step']}, but its name says {int(name[1])}")
    weights = state["byol"]
    if not isinstance(weights, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()):
        raise ValueError("its networks are not named tensors")
    from_plain(TrainConfig, state["config"], where="config.")


def _why_not_loaded(error: Exception, payload: bytes) -> str:
    """Returns why a file could not be loaded, in words that do not need torch's source to be understood."""
    # torch's own text advises to load the file with weights_only=False, which would run the code in it.
    if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it asks for {wanted[1]}, but only tensors and plain values are accepted"
    if is_cut_archive(io.BytesIO(payload)):
        return "it is cut short or damaged; copy it again"
    # On bytes that are no pickle, unpickling may raise any of these.
    if isinstance(error, UnpicklingError | EOFError | LookupError | AttributeError | TypeError | UnicodeError | struct.error):
        return "torch.save did not write it"
    if isinstance(error, RuntimeError | zipfile.BadZipFile) and zipfile.is_zipfile(io.BytesIO(payload)):
        return "torch.save did not write it" if _is_archive_of_others(payload) else "it is damaged; copy it again"
    return first_line(error)


def _is_archive_of_others(payload: bytes) -> bool:
    """Returns True for a complete zip archive without data.pkl, which torch.save writes into every file."""
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            return not any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def is_cut_archive(file: IO[bytes]) -> bool:
    """Returns True for the beginning of a zip archive whose end, which says what it holds, is missing or damaged."""
    file.seek(0)
    return file.read(4) == b"PK\x03\x04" and not zipfile.is_zipfile(file)


def load_newest(
    run: Path,
    *,
    config: TrainConfig | None = None,
    check: Callable[[dict[str, Any]], str | None] = lambda state: None,
    way_out: str = "start again with another --out",
) -> dict[str, Any] | None:
    """Returns the state of a run's newest good checkpoint, or None if it has no checkpoint yet; a damaged one is reported and skipped.

    Args:
        run: the run folder.
        config: the run's config, which a good checkpoint shares; None reads it from the folder.
        check: returns what else is wrong with a state, or None.
        way_out: what helps, for the message, if no checkpoint is good.

    Raises CheckpointError if there are checkpoints but none is good.
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
            f"{run / FOLDER}: all {len(steps)} checkpoints are damaged or of another run; {way_out} (the newest: {reasons[0]})"
        )
    return None


def _recorded_config(run: Path) -> TrainConfig | None:
    try:
        return read_config(run)
    except UserError:
        return None


def mend_config(run: Path) -> None:
    """Rewrites a missing or unreadable config.yaml from the newest good checkpoint, if the run has one.

    Raises UserError if none of its checkpoints is good or the folder cannot be written.
    """
    try:
        if not checkpoint_steps(run) or _recorded_config(run):
            return
    except OSError:  # check_run_folder reports an unusable folder
        return
    state = load_newest(run)
    assert state is not None
    path = run / CONFIG_FILE
    try:
        # Kept under another name, so that nothing that someone may have written into it is lost.
        if path.exists() and path.stat().st_size:
            path.replace(path.with_name(f"{CONFIG_FILE}.damaged"))
        write_config(run, from_plain(TrainConfig, state["config"]))
    except OSError as error:
        raise UserError(f"{path}: cannot be read, and cannot be rewritten ({error.strerror}); choose another --out") from error
    log.warning("%s could not be read; it is restored from the checkpoint after step %d", path, state["step"])


def load_run(path: str | Path, *, option: str = "checkpoint") -> RunState:
    """Loads a run from its folder (newest good checkpoint) or from a single checkpoint file, which may be stored anywhere.

    Raises UserError, naming the option, if there is no such path or nothing to load there.
    """
    path = Path(path)
    if path.is_dir():
        state = load_newest(path, way_out=f"give another {option}")
        if state is None:
            raise UserError(f"{option} = {str(path)!r}: no checkpoints/step-*.pt in it; give a run folder or a checkpoint file")
        folder, results = path, path / RESULTS
    elif path.is_file():
        state, folder, results = load_checkpoint(path), path.parent, path.with_name(f"{path.stem}.{RESULTS}")
        # A checkpoint that still lies in its run has its results there; one that was copied elsewhere has them beside it.
        if _NAME.match(path.name) and path.parent.name == FOLDER and (path.parent.parent / CONFIG_FILE).exists():
            folder, results = path.parent.parent, path.parent.parent / RESULTS
    else:
        raise UserError(f"{option} = {str(path)!r}: no such file or folder; give a run folder or a checkpoint file")
    config = from_plain(TrainConfig, state["config"])
    return RunState(config=config, state=state, step=state["step"], folder=folder, results=results)


def check_resume(config: TrainConfig, *, mirrored: Sequence[int] = ()) -> None:
    """Raises UserError for `resume` 'must' without a checkpoint or 'never' with one; a restart by torchrun or SLURM always continues.

    mirrored: steps of the checkpoints in the run's mirror, which count like those in its folder.
    """
    steps = sorted({*checkpoint_steps(Path(config.out)), *mirrored})
    where = f"{config.out} or {config.mirror}" if config.mirror else config.out
    if config.resume == "must" and not steps:
        raise UserError(f"resume = 'must': {where} holds no checkpoint; leave it out to start the run")
    # A launcher repeats the original command after a failure, so 'never' must not refuse the checkpoints of its own first attempt.
    restarted = any((os.environ.get(name) or "0") != "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    if config.resume == "never" and steps and not restarted:
        raise UserError(f"resume = 'never': {where} holds a run of {steps[-1]} steps; choose another --out, or leave it out to continue")


def sweep_unfinished(run: Path) -> None:
    """Removes files that a process killed while writing left behind. Only the one process that writes to this folder may call it."""
    folder = run / FOLDER
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if UNFINISHED in path.name:
            log.info("ignoring unfinished file %s", path)
            path.unlink()
        elif path.suffix == ".sha256" and not path.with_suffix(".pt").exists():
            path.unlink()


class _DigestingFile(io.RawIOBase):
    """Passes writes through to a file and computes their sha256. It keeps the OSError, because torch's zip writer hides it."""

    def __init__(self, file: io.RawIOBase | io.FileIO) -> None:
        self._file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            # In pieces, so that the training thread gets the interpreter lock in between.
            for start in range(0, len(view), _PIECE_BYTES):
                piece = view[start : start + _PIECE_BYTES]
                self.digest.update(piece)
                # An unbuffered file may write less than it was given, for example when the disk fills up.
                while piece:
                    piece = piece[self._file.write(piece) or 0 :]
        except OSError as error:
            self.error = error
            raise
        return len(view)


def _write_durably(path: Path, state: dict[str, Any]) -> None:
    with durable_file(path) as file:
        through = _DigestingFile(cast(io.RawIOBase, file))
        try:
            torch.save(state, cast(IO[bytes], through))
        except RuntimeError as error:
            # torch's zip writer reports the file's OSError as a RuntimeError without errno.
            raise through.error or error from error
        # The order matters: the state, then its digest, then (leaving the block) the checkpoint's name. A crash in between leaves only
        # files that sweep_unfinished removes, and a checkpoint without its digest can only be a copy.
        os.fsync(file.fileno())
        write_durably(digest_path(path), through.digest.hexdigest() + "\n")


def digest_path(path: Path) -> Path:
    """Returns the path of the sha256 file beside a checkpoint."""
    return path.with_suffix(".sha256")


def _free_megabytes(folder: Path) -> float:
    try:
        return shutil.disk_usage(folder).free / 1e6
    except OSError:  # the folder itself could not be made
        return 0.0
