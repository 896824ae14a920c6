"""The run folder and what is written there while it runs: config, provenance, metrics as JSONL and TensorBoard, a readable log."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from fastbyol.config.errors import UserError
from fastbyol.config.plain import from_plain, to_plain
from fastbyol.config.schema import MonitorsConfig, TrainConfig
from fastbyol.progress import PROGRESS, live_line, progress_line
from fastbyol.provenance import collect_provenance
from fastbyol.wandb_log import WandbLog

log = logging.getLogger("fastbyol")
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
PROVENANCE_FILE = "provenance.json"
FREE_TO_CHANGE = frozenset(
    {"out", "log_every", "checkpoint_every", "keep_checkpoints", "data.train", "data.backend", "data.workers", "data.prefetch", "data.val"}
    | {f"monitors.{f.name}" for f in dataclasses.fields(MonitorsConfig)}
)
"""A run may continue with other values of these: they do not touch what it computes. The number of images is checked on its own."""


def open_run_folder(config: TrainConfig) -> Path:
    """Creates the run's folder, or reopens it where it holds this very config (a run continues where it stopped).

    Raises:
        UserError: no name given, a folder that cannot be made, or one that belongs to another run.
    """
    if not config.out:
        raise UserError("out = '': name the run's folder, for example --out runs/r50")
    folder = Path(config.out)
    existing = folder / CONFIG_FILE
    if existing.exists():
        _refuse_other_config(config, existing)
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"out = {config.out!r}: exists and is not a run of fastbyol; choose a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        existing.write_text(yaml.safe_dump(to_plain(config), sort_keys=False))
    except OSError as error:
        raise UserError(f"out = {config.out!r}: cannot be written ({error.strerror}); choose another folder") from error
    (folder / PROVENANCE_FILE).write_text(json.dumps(collect_provenance(), indent=2))
    return folder


def _refuse_other_config(config: TrainConfig, existing: Path) -> None:
    try:
        recorded = from_plain(TrainConfig, yaml.safe_load(existing.read_text()))
    except (yaml.YAMLError, UserError, AttributeError) as error:
        raise UserError(f"{existing}: is not readable as a run's config ({error}); choose a new --out") from error
    old, new = flatten(to_plain(recorded)), flatten(to_plain(config))
    different = {key for key, value in new.items() if old.get(key) != value} - FREE_TO_CHANGE
    changed = [f"{key} was {old.get(key)!r}, is {new[key]!r}" for key in sorted(different)]
    if changed:
        raise UserError(f"out = {config.out!r}: holds a run with another config ({'; '.join(changed[:5])}); choose a new folder")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


class RunLog:
    """Writes one record per logged step; only the main process has one.

    Args:
        folder: the run folder.
        total_steps: shown in the progress line.
        first_step: where this process starts; records of later steps, left by a run that was cut off, are dropped.
        wandb_project: Weights & Biases gets the records too; empty: it does not.
    """

    def __init__(self, folder: Path, *, total_steps: int, first_step: int, wandb_project: str = "") -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.total_steps = total_steps
        path = folder / METRICS_FILE
        kept = [r for r in read_metrics(folder) if r["step"] < first_step]
        path.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self._earlier_s = kept[-1]["time_s"] if kept else 0.0
        self._start = time.perf_counter()
        self._alarmed = False
        self._file = path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self._wandb = WandbLog(folder, project=wandb_project, config=_recorded_config(folder)) if wandb_project else None
        self._live = live_line(total_steps=total_steps, first_step=first_step)
        configure_logging(folder / "train.log", screen=self._live.handler() if self._live else None)

    def write(self, record: dict[str, Any]) -> None:
        """One logged step: `step` (0-based, just taken) and numbers, texts or None."""
        record = {**record, "time_s": round(self._earlier_s + time.perf_counter() - self._start, 3)}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.write(record)
        if self._live is not None:
            self._live.show(record)
        log.info(progress_line(record, total_steps=self.total_steps), extra=PROGRESS)
        if record["alarm"] and not self._alarmed:
            log.warning("ALARM %s", record["alarm"])
        self._alarmed = bool(record["alarm"])

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.close()
        if self._live is not None:
            self._live.close()


def _recorded_config(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / CONFIG_FILE).read_text())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl in order; a last line cut by a kill is left out."""
    path = folder / METRICS_FILE
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def configure_logging(file: Path | None = None, *, quiet: bool = False, screen: logging.Handler | None = None) -> None:
    """Plain lines on stderr (or to `screen` instead), and in the file where one is given; quiet ranks say warnings only."""
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log.propagate = False
    close_logging()
    handlers: list[logging.Handler] = [screen or logging.StreamHandler(sys.stderr)]
    if file is not None:
        handlers.append(logging.FileHandler(file))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        log.addHandler(handler)


def close_logging() -> None:
    """Closes the log's files and the live line, so that what is said after it stands in lines of its own."""
    for handler in log.handlers:
        handler.close()
    log.handlers.clear()
