"""The run folder: which run it belongs to, whether that run may be continued, and a lock so that only one job writes there."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from fastbyol.config.errors import UserError, shortened, shown
from fastbyol.config.plain import flatten, from_plain, to_plain
from fastbyol.config.schema import MonitorsConfig, TrainConfig
from fastbyol.host.durable_files import UNFINISHED, locked_file, write_durably
from fastbyol.run.plain_yaml import read_yaml
from fastbyol.run.provenance import collect_provenance

CONFIG_FILE = "config.yaml"
PROVENANCE_FILE = "provenance.json"
LOCK_FILE = "lock"
DIVERGED_FILE = "diverged.txt"
"""Holds the reason why a run diverged or collapsed; the next start that continues the run removes it."""
CUT_OFF_START = frozenset({LOCK_FILE, PROVENANCE_FILE, CONFIG_FILE, f"{CONFIG_FILE}.tmp", "lost+found"})
"""Files in the folder of a start that was killed before it wrote its config, or lost it in a power cut, and of a new volume."""
LOCK_PATIENCE_S = 15.0
"""Seconds to wait for the lock: a job that was told to stop may still be saving when the next one starts."""
FREE_TO_CHANGE = frozenset(
    {
        *("out", "resume", "mirror", "timeout_s", "grace_s", "profile_steps", "rank_batch", "optim.update"),
        *(f"precision.{name}" for name in ("compile", "compile_mode", "compile_cache", "pad_stem", "freed_memory")),
        *("log_every", "checkpoint_every", "keep_checkpoints", "keep_every_epochs"),
        *("data.train", "data.val", "data.backend", "data.workers", "data.prefetch", "data.cache", "data.cache_gib"),
        *(f"monitors.{field.name}" for field in dataclasses.fields(MonitorsConfig)),
    }
)
"""Options that may change when a run is continued. They do not affect the result, except rank_batch, whose effect on batch norm is
reported, and optim.update, precision.compile and data.backend, whose choices compute the same formulas but may round differently. The images
are checked separately.
"""


def check_run_folder(config: TrainConfig) -> None:
    """Raises UserError if no folder is named, it cannot be created, or it is another run's. Called before any work; creates nothing."""
    if not config.out:
        raise UserError("out = '': name the run's folder, for example --out runs/r50")
    folder = Path(config.out)
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            folder.stat()
    except (OSError, ValueError) as error:  # name too long or with a zero byte, no permission, a loop of links
        raise UserError(
            f"out = {config.out!r}: cannot be used ({getattr(error, 'strerror', None) or error}); choose another folder"
        ) from error
    if not _is_blank(folder / CONFIG_FILE):
        if changed := config_changes(read_config(folder), config):
            raise UserError(f"out = {config.out!r}: holds a run with another config ({'; '.join(changed[:5])}); choose a new folder")
    elif folder.exists() and not _is_cut_off_start(folder):
        raise UserError(f"out = {config.out!r}: exists and is not a run of fastbyol; choose a new folder")
    target = Path(os.path.realpath(folder))  # through a dangling link, so that the folder is created at its target
    existing = next(p for p in (target, *target.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):  # os.access is no test: it allows root to write on a read-only file system
            pass
    except OSError as error:
        raise UserError(f"out = {config.out!r}: cannot be written ({existing}: {error.strerror}); choose another folder") from error


def open_run_folder(config: TrainConfig) -> Path:
    """Creates the run folder, or reopens it if it holds the same config (then the run continues where it stopped)."""
    # Checked again, although the run has checked it: reading the data has taken a while, and another job may have taken the folder.
    check_run_folder(config)
    folder = Path(config.out)
    if not _is_blank(folder / CONFIG_FILE):
        return folder
    try:
        Path(os.path.realpath(folder)).mkdir(parents=True, exist_ok=True)
        # config.yaml comes last: it marks the folder as a run, so a start that is cut off before can simply be repeated.
        write_durably(folder / PROVENANCE_FILE, json.dumps(collect_provenance(), indent=2))
        write_config(folder, config)
    except OSError as error:
        raise UserError(f"out = {config.out!r}: cannot be written ({error.strerror}); choose another folder") from error
    return folder


def write_config(folder: Path, config: TrainConfig) -> None:
    write_durably(folder / CONFIG_FILE, yaml.safe_dump(to_plain(config), sort_keys=False))


def read_config(folder: Path, *, way_out: str = "choose a new --out") -> TrainConfig:
    """Returns the config stored in a run folder. Raises UserError, with the way out, if there is none or it cannot be read."""
    path = folder / CONFIG_FILE
    try:
        return from_plain(TrainConfig, read_yaml(path.read_text(encoding="utf-8")))  # type: ignore[arg-type]
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{path}: is not readable as a run's config ({why}); {way_out}") from error


def note_divergence(folder: Path, why: str) -> None:
    """Keeps in the run folder why the run diverged or collapsed, for those who look at it later; a full disk loses only this note."""
    with suppress(OSError):
        write_durably(folder / DIVERGED_FILE, f"{' '.join(why.split())}\n")


def divergence_of(folder: Path) -> str:
    """Returns why the run diverged or collapsed, or '' if it did not, in one line of at most 500 characters."""
    path = folder / DIVERGED_FILE
    if not path.is_file():
        return ""
    try:
        with path.open("rb") as file:
            return shortened(file.read(2000).decode("utf-8", errors="replace").strip() or "no reason is kept", limit=500)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"


def is_collapse(why: str) -> bool:
    """Returns True if `divergence_of` says that the run was stopped for its collapse, so that its checkpoint can be evaluated."""
    return why.startswith("collapse")


@contextmanager
def locked_run_folder(folder: Path) -> Iterator[None]:
    """Keeps other jobs from writing to the folder. Raises UserError if another one holds the lock for longer than LOCK_PATIENCE_S."""
    try:
        descriptor = locked_file(folder / LOCK_FILE, patience_s=LOCK_PATIENCE_S)
    except BlockingIOError as error:
        raise UserError(f"out = {str(folder)!r}: is in use by {error.strerror}; wait for it or choose another folder") from None
    try:
        yield
    finally:
        os.close(descriptor)


def _is_blank(path: Path) -> bool:
    """Returns True if the file is missing, empty, or holds only zeros, as after a power cut."""
    try:
        return not path.read_bytes().strip(b"\0 \r\n")
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # it exists; read_config will report what is wrong with it
        return False


def _is_cut_off_start(folder: Path) -> bool:
    """Returns True if a run may start in this folder because it holds nothing that a run could be continued from."""
    # A power cut may leave a config of zeros beside a complete log; without a checkpoint there is still nothing to lose.
    lost_config = (folder / CONFIG_FILE).exists() and not any(folder.glob("checkpoints/*.pt"))
    return lost_config or (folder.is_dir() and all(p.name.split(UNFINISHED)[0] in CUT_OFF_START for p in folder.iterdir()))


def config_changes(old: TrainConfig, new: TrainConfig, *, free: frozenset[str] = FREE_TO_CHANGE) -> list[str]:
    """Returns 'name was x, is y' for each option that differs and is not in `free`."""
    before, now = flatten(to_plain(old)), flatten(to_plain(new))
    different = sorted(name for name, value in now.items() if before.get(name) != value and name not in free)
    return [f"{name} was {shown(before.get(name))}, is {shown(now[name])}" for name in different]
