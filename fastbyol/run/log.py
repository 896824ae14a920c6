"""Logging of a run: metrics as JSONL and TensorBoard, and a readable text log."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
import warnings
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fastbyol.config.console import PrintableFormatter, in_utf8
from fastbyol.config.errors import UserError
from fastbyol.config.plain import to_plain
from fastbyol.config.schema import TrainConfig
from fastbyol.host.durable_files import write_durably
from fastbyol.host.quantities import duration_text
from fastbyol.host.saved_structure import is_count
from fastbyol.run.live_line import PROGRESS, live_line, progress_line
from fastbyol.run.wandb_log import WandbLog

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("fastbyol")
METRICS_FILE = "metrics.jsonl"
UNCOUNTED_STEPS, ESTIMATE_STEPS = 5, 50


class RunLog:
    """Writes one record per logged step to metrics.jsonl, TensorBoard, Weights & Biases if the config asks for it, and the live line.

    Only the main process has one. This process starts at `first_step`.
    """

    def __init__(self, folder: Path, config: TrainConfig, *, total_steps: int, first_step: int) -> None:
        self.total_steps, self.first_step = total_steps, first_step
        path = folder / METRICS_FILE
        # Steps after the checkpoint are taken again: without this their records would appear twice.
        kept = [r for r in read_metrics(folder) if r["step"] < first_step]
        try:
            write_durably(path, "".join(json.dumps(r) + "\n" for r in kept))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); free some space; nothing is lost") from error
        self._earlier_s = (kept[-1].get("time_s") if kept else None) or 0.0
        self._start = self._counted_from = time.perf_counter()
        self._alarmed = False
        self._file = path.open("a")
        self._board = _board(folder, first_step=first_step)
        project = config.monitors.wandb_project
        self._wandb = WandbLog(folder, project=project, config=to_plain(config)) if project else None
        self._live = live_line(total_steps=total_steps, first_step=first_step)
        configure_logging(folder / "train.log", screen=self._live.handler() if self._live else None)
        if self._board is None:
            log.info("TensorBoard's files are not written: pip install 'fastbyol[tensorboard]'; %s has the same figures", path)

    def estimate(self, done: int) -> None:
        """Logs once, ESTIMATE_STEPS after the start of this process, how long the steps after the first `done` of the run will take."""
        taken = done - self.first_step
        # The first steps compile, touch memory for the first time and fill queues.
        if taken == UNCOUNTED_STEPS:
            self._counted_from = time.perf_counter()
        if taken == ESTIMATE_STEPS:
            step_s = (time.perf_counter() - self._counted_from) / (ESTIMATE_STEPS - UNCOUNTED_STEPS)
            left_s = step_s * (self.total_steps - done)
            end = (datetime.now() + timedelta(seconds=left_s)).strftime("%A %d %B %H:%M")
            log.info(
                "%.3g s a step: the remaining %d steps take about %s, until %s", step_s, self.total_steps - done, duration_text(left_s), end
            )

    def write(self, record: dict[str, Any]) -> None:
        """Writes the record of one logged step: `step` (0-based, just taken) and numbers, texts or None."""
        record = {**record, "time_s": round(self._earlier_s + time.perf_counter() - self._start, 3)}
        try:
            self._file.write(json.dumps(record) + "\n")
            # Flushed at once, so that the record of the step that kills the process is in the file, and others can follow it.
            self._file.flush()
            for name, value in record.items():
                if self._board is not None and isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, record["step"])
            if self._wandb is not None:
                self._wandb.write(record)
            if self._live is not None:
                self._live.show(record)
        except OSError as error:
            log.warning("%s: step %d could not be recorded (%s); training goes on", self._file.name, record["step"] + 1, error.strerror)
        log.info(progress_line(record, total_steps=self.total_steps), extra=PROGRESS)
        # Warn once per spell: every record of it has the alarm.
        if record["alarm"] and not self._alarmed:
            log.warning("ALARM %s", record["alarm"])
        self._alarmed = bool(record["alarm"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # already reported when writing failed
            self._file.close()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
        if self._wandb is not None:
            self._wandb.close()
        if self._live is not None:
            self._live.close()


def _board(folder: Path, *, first_step: int) -> SummaryWriter | None:
    """Returns TensorBoard's writer of the run, or None if tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(f"{in_utf8(folder)}/tensorboard", purge_step=first_step)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the records of metrics.jsonl in order; UserError if it cannot be read. Damaged lines are skipped with a warning."""
    path = folder / METRICS_FILE
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); move it away to continue without it") from error
    # A kill or a full disk may cut a line, which must not end the run that is resumed.
    records = [record for line in lines if (record := _record_in(line)) is not None]
    if len(records) < len(lines):
        log.warning("%s: %d of %d lines are damaged and left out", path, len(lines) - len(records), len(lines))
    return records


def _record_in(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not is_count(record.get("step")):
        return None
    texts = {name for name, value in record.items() if not isinstance(value, int | float | None)}
    return record if texts <= {"alarm"} and isinstance(record.get("alarm"), str | None) else None


def configure_logging(file: Path | None = None, *, quiet: bool = False, screen: logging.Handler | None = None) -> None:
    """Sets up plain log lines on stderr (or `screen`) and in `file` if given; a quiet rank logs errors only, and shows no warnings."""
    # All ranks give the same warnings, and once is enough.
    log.setLevel(logging.ERROR if quiet else logging.INFO)
    if quiet:
        warnings.simplefilter("ignore")
    log.propagate = False
    close_logging()
    handlers: list[logging.Handler] = [screen or logging.StreamHandler(sys.stderr)]
    if file is not None:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
        handlers[-1].handleError = lambda record: None  # type: ignore[method-assign]  # a full disk: stderr still has the line
    for handler in handlers:
        handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        log.addHandler(handler)


def close_logging() -> None:
    """Closes the log files and the live line, so that later messages start on a line of their own."""
    for handler in log.handlers:
        handler.close()
    log.handlers.clear()
