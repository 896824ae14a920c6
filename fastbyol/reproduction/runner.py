"""Runs the rows of the paper's tables: trains each in a run folder of its own, evaluates it, and keeps a record, so that nothing is done twice.

Several processes, or several machines with a shared disk, may work on one folder: each run is locked by the one that does it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import yaml

from fastbyol.config.errors import DIVERGED_EXIT, STOPPED_EXIT, STORAGE_EXIT, USER_ERROR_EXIT, RunError, UserError, first_line
from fastbyol.config.plain import from_plain, nearest_name, to_plain
from fastbyol.config.schema import TrainConfig
from fastbyol.evaluation.splits import Splits, open_splits, split_paths
from fastbyol.evaluation.training_log import alarms
from fastbyol.host.durable_files import locked_file, write_durably
from fastbyol.host.signals import StopRequest, end_with_parent
from fastbyol.ranks.parts import parse_part, without_launcher
from fastbyol.reproduction.records import FREE, Record, Setup, read_record, record_path, write_record
from fastbyol.reproduction.rows import UNCHANGED, row_config, run_at
from fastbyol.reproduction.scoring import last_error, paper_linear, scores_of
from fastbyol.reproduction.tables import BASE_RUNS, SIMCLR, Table
from fastbyol.run.checkpoint import checkpoint_steps, load_run
from fastbyol.run.folder import LOCK_FILE, config_changes, divergence_of, is_collapse
from fastbyol.run.log import read_metrics
from fastbyol.run.provenance import collect_provenance

RUNS = "runs"
BATCH = 256
"""Images per forward of the evaluation."""


class Stopped(RunError):
    """A signal ended the command between two steps; the same command goes on from there."""

    exit_code = STOPPED_EXIT


class StorageFull(RunError):
    """A run could not be saved, so no other could be."""

    exit_code = STORAGE_EXIT


@dataclass(frozen=True)
class Cost:
    """Holds the seconds that the training of a run has taken, in the fields of `Record`."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    cost_is_whole: bool = True


@dataclass(frozen=True)
class PlannedRun:
    """One run of a row with one seed, with its whole config. record: its record so far, also one of a failure; None without one."""

    run: str
    seed: int
    config: TrainConfig
    record: Record | None

    @property
    def name(self) -> str:
        return f"{self.run}-seed{self.seed}"

    @property
    def done(self) -> bool:
        return self.record is not None and self.record.status != "failed"


def planned_runs(tables: Sequence[Table], setup: Setup, folder: Path, *, seeds: int) -> list[PlannedRun]:
    """Returns the runs of the tables in the order in which they are done: all rows with the first seed, then with the next.

    A run that several rows share is there once, one that has no meaning at the set-up's scale is left out.
    Raises UserError if a record is of another config.
    """
    named = [row.base for table in tables for row in table.rows] + [row.run for table in tables for row in table.rows]
    names = list(dict.fromkeys(run_at(setup.scale, name) for name in named))
    found = []
    for seed in range(seeds):
        for name in names:
            choice = row_config(name, scale=setup.scale, base=setup.base, ranks=setup.ranks)
            if choice.config is None:
                continue
            data = replace(choice.config.data, train=split_paths(setup.data)[0])
            place = f"{name}-seed{seed}"
            # Each run has a mirror folder of its own: at one URL, the second run would continue from the first run's checkpoint.
            mirror = f"{choice.config.mirror.rstrip('/')}/{place}" if choice.config.mirror else ""
            config = replace(choice.config, seed=seed, data=data, out=str(folder / RUNS / place), mirror=mirror)
            found.append(PlannedRun(name, seed, config, record=_record_of(folder, name, seed, config)))
    return found


def _record_of(folder: Path, run: str, seed: int, config: TrainConfig) -> Record | None:
    """Returns the record of a run, None without one. Raises UserError if it is of another config."""
    path = record_path(folder, run, seed)
    if not path.exists():
        return None
    record = read_record(path)
    if changed := config_changes(record.config, config, free=FREE):
        raise UserError(f"{path}: is of a run with other settings ({'; '.join(changed[:3])}); delete it, or choose another --out")
    return record


def part_of(runs: Sequence[PlannedRun], rows: Sequence[str]) -> list[PlannedRun]:
    """Returns the runs that --rows names: part i of n of them for 'i/n' or 'auto', else the runs of these names. Raises UserError for a wrong one."""
    if not rows:
        return list(runs)
    if len(rows) == 1 and ("/" in rows[0] or rows[0] == "auto"):
        return list(runs[parse_part(rows[0], option="--rows").rows(len(runs))])
    known = list(dict.fromkeys(run.run for run in runs))
    if wrong := [name for name in rows if name not in known]:
        raise UserError(f"--rows {wrong[0]}: no such row at this scale{nearest_name(wrong[0], known)}; there are {', '.join(known)}")
    return [run for run in runs if run.run in rows]


@dataclass
class Runner:
    """Does planned runs one after the other.

    folder: where runs and records lie. stop: asked between and during runs. announce: called with a line for each run. after_each: called
    after each record.
    """

    setup: Setup
    folder: Path
    stop: StopRequest
    announce: Callable[[str], None]
    after_each: Callable[[], None]
    command: str
    _splits: Splits | None = field(default=None, init=False)

    def run_all(self, runs: Sequence[PlannedRun]) -> list[Record]:
        """Does the runs that are not done and returns their records. Raises Stopped if it was asked to stop, StorageFull if the disk is full."""
        records: list[Record] = []
        with ExitStack() as leaving, _full_disk_in_one_line(self.folder):
            to_do = [run for run in runs if not run.done]
            for number, run in enumerate(to_do, start=1):
                if self.stop.requested:
                    raise Stopped(f"stopped before {run.name}; the same command goes on from there")
                with self._claimed(run) as is_ours:
                    # Another process may have done it in the meantime; if it failed there, it would here too.
                    if not is_ours or _record_of(self.folder, run.run, run.seed, run.config) not in (None, run.record):
                        continue
                    if self._splits is None:
                        self._splits = leaving.enter_context(open_splits(self.setup.data, views=run.config.views, batch=BATCH))
                    record = self._record(run)
                    write_record(self.folder, record)
                records.append(record)
                self.announce(f"[{number}/{len(to_do)}] {run.name}: {_summary(record)}")
                self.after_each()
        return records

    @contextmanager
    def _claimed(self, run: PlannedRun) -> Iterator[bool]:
        """Yields True while this process alone does the run, False if another one does it."""
        try:
            (self.folder / RUNS).mkdir(parents=True, exist_ok=True)
            descriptor = locked_file(self.folder / RUNS / f"{run.name}.lock")
        except BlockingIOError as error:
            self.announce(f"{run.name}: is being run by {error.strerror}")
            yield False
            return
        try:
            yield True
        finally:
            os.close(descriptor)

    def _record(self, run: PlannedRun) -> Record:
        """Trains and evaluates a run."""
        output, folder = self.folder / RUNS / f"{run.name}.log", Path(run.config.out)
        command = [*self._launcher(), "-m", "fastbyol.train", "--config", str(self._config_file(run)), "--out", str(folder)]
        # Do not train a run again that was stopped for its collapse: each restart would move the step that is evaluated.
        code = DIVERGED_EXIT if is_collapse(divergence_of(folder)) else self._train(command, output, run)
        if self.stop.requested or code == STOPPED_EXIT:
            raise Stopped(f"stopped during {run.name}; the same command goes on from there")
        why = _why_it_ended(code, folder, output)
        if code == STORAGE_EXIT:
            raise StorageFull(f"{run.name}: {why}")
        # Without the command: the record has it as typed, while this one begins with a path of this machine.
        provenance = {name: value for name, value in collect_provenance().items() if name != "command"}
        record = Record(run.run, run.seed, "complete", run.config, why=why, ranks=self.setup.ranks, provenance=provenance)
        record = replace(record, command=self.command, device=_device_name(), **asdict(_read_cost(self._cost_file(run))))
        collapsed = code == DIVERGED_EXIT and is_collapse(why)
        if code and not collapsed:
            return replace(record, status="diverged" if code == DIVERGED_EXIT else "failed")
        try:
            record = self._scored(run, record)
        except Exception as error:  # for example out of memory, which the next row need not meet
            if isinstance(error, Stopped | StorageFull) or _is_full_disk(error):
                raise
            return replace(record, status="failed", why=first_line(error, limit=500))
        metrics = read_metrics(folder)
        if collapsed or (metrics and alarms(metrics[-1:])):
            record = replace(record, status="collapsed", why=record.why or alarms(metrics[-1:])[0].partition(";")[0])
        return record

    def _train(self, command: list[str], output: Path, run: PlannedRun) -> int:
        """Trains the run, from where it was stopped, adds what this took to its cost, and returns the exit code."""
        folder = Path(run.config.out)
        if folder.is_dir():
            # If an earlier `reproduce` was killed, its training received a stop signal and may still be saving, for up to grace_s.
            with suppress(BlockingIOError):
                os.close(locked_file(folder / LOCK_FILE, patience_s=run.config.grace_s))
        elif not folder.exists():
            self._cost_file(run).unlink(missing_ok=True)  # of a run that was deleted
        cost, before, start, cpu_before = _read_cost(self._cost_file(run)), _last_step(folder), time.perf_counter(), _cpu_s()
        # Written before the start: if this process is killed, the cost of this start is never counted.
        _write_cost(self._cost_file(run), replace(cost, cost_is_whole=False))
        code = self._execute(command, output)
        if _last_step(folder) != before or code == DIVERGED_EXIT:  # not counted: a start that found the run complete, or failed at once
            wall_s, cpu_s = time.perf_counter() - start, _cpu_s() - cpu_before
            cost = replace(cost, wall_s=round(cost.wall_s + wall_s, 1), cpu_s=round(cost.cpu_s + cpu_s, 1))
        _write_cost(self._cost_file(run), cost)
        return code

    def _cost_file(self, run: PlannedRun) -> Path:
        return self.folder / RUNS / f"{run.name}.cost.json"

    def _scored(self, run: PlannedRun, record: Record) -> Record:
        assert self._splits is not None
        assert self._splits.val is not None
        state = load_run(run.config.out)
        is_base = run.run in (*UNCHANGED, BASE_RUNS[SIMCLR])
        paper = self.setup.linear == "paper"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found = scores_of(
            state, self._splits, device=device, quick_linear=not paper, baselines=is_base, data=self.setup.data, command=self.command
        )
        scores, signs = found.pop("byol"), found.pop("signs")
        if paper:
            output = self.folder / RUNS / f"{run.name}.linear.log"
            try:
                scores["linear"] = paper_linear(
                    Path(run.config.out), data=self.setup.data, launcher=self._launcher(), log=output, execute=self._execute
                )
            except UserError:
                if self.stop.requested:
                    raise Stopped(f"stopped in the evaluation of {run.name}; the same command goes on from there") from None
                raise
        sizes = {"num_train": self._splits.train.num_samples, "num_val": self._splits.val.num_samples}
        return replace(record, scores=scores, baselines=found, signs=signs, steps=state.step, **sizes)

    def _launcher(self) -> list[str]:
        if self.setup.ranks == 1:
            return [sys.executable]
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.setup.ranks)]

    def _config_file(self, run: PlannedRun) -> Path:
        path = self.folder / RUNS / f"{run.name}.yaml"
        write_durably(path, yaml.safe_dump({**to_plain(run.config), "out": ""}, sort_keys=False))
        return path

    def _execute(self, command: list[str], output: Path) -> int:
        """Runs a command, passes a request to stop on to it, and returns its exit code, or that of its first rank to fail."""
        environment = without_launcher(os.environ)  # a row's ranks are its own, not the processes that share the rows
        if not torch.cuda.is_available():
            # Networks this small gain little from a second thread, and float32 sums depend on the number of threads.
            environment.setdefault("OMP_NUM_THREADS", "1")
        told = False
        with output.open("w") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment, preexec_fn=end_with_parent
            )
            while True:
                try:
                    code = process.wait(0.2)
                    break
                except subprocess.TimeoutExpired:
                    if self.stop.requested and not told:
                        process.terminate()
                        told = True
        # torchrun itself ends with 1; its report has the exit codes of the ranks.
        codes = re.findall(r"exitcode\s*:\s*(-?\d+)", output.read_text(errors="replace")) if code == 1 else []
        return int(codes[-1]) if codes else code


@contextmanager
def _full_disk_in_one_line(folder: Path) -> Iterator[None]:
    """Turns an operating-system error that means that nothing can be written into StorageFull; all finished runs are kept."""
    try:
        yield
    except OSError as error:
        if not _is_full_disk(error):
            raise
        raise StorageFull(
            f"{error.filename or folder}: cannot be written ({error.strerror}); make room, and the same command goes on"
        ) from error


def _is_full_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def _why_it_ended(code: int, folder: Path, output: Path) -> str:
    """Returns why a training ended with an exit code; '' for 0. The note in the folder may be of an earlier start, if this one did not diverge."""
    if code == 0:
        return ""
    if code == DIVERGED_EXIT and (why := divergence_of(folder)):
        return why
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    # Training's advice on --out does not apply to this command, which chooses the folders itself.
    ours = f"; if the fault is in {folder}, delete it, and the row is trained anew" if code == USER_ERROR_EXIT and folder.exists() else ""
    return last_error(output) + ours


def _last_step(folder: Path) -> int:
    """Returns the step from which a run will go on, 0 for a new one."""
    return max(checkpoint_steps(folder), default=0)


def _read_cost(path: Path) -> Cost:
    """Returns what a run's training has taken in all its starts; nothing for a run without a file, and not whole if the file cannot be read."""
    try:
        return from_plain(Cost, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Cost()
    except (OSError, ValueError, TypeError):
        return Cost(cost_is_whole=False)


def _write_cost(path: Path, cost: Cost) -> None:
    write_durably(path, json.dumps(asdict(cost)))


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _summary(record: Record) -> str:
    figures = ", ".join(f"{name} {100 * value:.1f} %" for name, value in record.scores.items())
    state = "" if record.status == "complete" else f"{record.status}: {record.why}"
    return "; ".join(part for part in (figures, state, f"{record.wall_s:.0f} s" if record.wall_s else "") if part)
