"""The state that all measurements share: the request, this machine's share of the run, and what has been found so far."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastbyol.config.schema import DataConfig, PrecisionConfig, TrainConfig
from fastbyol.data.batch import ViewBatch
from fastbyol.ranks.process_group import Process
from fastbyol.tuning.comparison import Comparison, Trial, compare
from fastbyol.tuning.report import start_command
from fastbyol.tuning.stepper import Stepper, release_memory


@dataclass(frozen=True)
class Request:
    """The request that a user makes of `tune`: the config of the run to come, whose data.train is not read, and how to measure."""

    config: TrainConfig
    paths: Sequence[str]
    """The same images, one path for each form they are stored in."""
    ranks: int | None = None
    """Processes of the run, one per GPU; None means one for each GPU here, or one on a CPU."""
    seconds: float = 10.0
    """Time for each comparison."""
    kept: frozenset[str] = frozenset()
    """Dotted names of the options that are not tuned."""


@dataclass
class Findings:
    """The measurements made so far, and the config with the best settings so far."""

    config: TrainConfig
    per: str
    """The unit that images per second refer to."""
    ranks: int
    comparisons: list[Comparison] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    """The reason for a setting, by its dotted name."""
    lines: list[str] = field(default_factory=list)
    """The conclusion in words."""

    def add(self, comparison: Comparison, *names: str) -> str:
        """Keeps the comparison, notes it as the reason for these settings, and returns its best candidate."""
        self.comparisons.append(comparison)
        for name in names:
            self.notes[name] = "; ".join([self.notes.get(name, f"images/s per {self.per}"), comparison.summary])
        return comparison.best

    def choose(self, **parts: Any) -> None:
        """Puts the given parts into the config."""
        self.config = replace(self.config, **parts)

    def command(self, path: Path) -> str:
        """Returns the command that starts the run from the config file at the path."""
        return start_command(path, ranks=self.ranks, out="runs/tuned")


@dataclass(frozen=True)
class Bench:
    """One process that works as one rank of the run would, but exchanges no messages with other ranks."""

    request: Request
    process: Process
    share: int
    """Images per optimizer step of one rank."""
    cores: int
    """Cores of this machine for one rank."""
    found: Findings
    announce: Callable[[str], None]
    sample: list[ViewBatch] = field(default_factory=list)
    """One batch of real images, once `data` has been opened."""
    make_stepper: Callable[[TrainConfig, Process], Stepper] = Stepper

    @property
    def on_gpu(self) -> bool:
        return self.process.device.type == "cuda"

    @property
    def micro_batch(self) -> int:
        """Images of one forward pass, by the config so far."""
        return self.found.config.rank_batch or self.share

    @property
    def accumulate(self) -> int:
        """Forward passes of one optimizer step, by the config so far."""
        return self.share // self.micro_batch

    def keeps(self, name: str) -> bool:
        """Says whether the user has set this option, so that it is not tuned."""
        return name in self.request.kept

    def trial_config(self, batch: int, *, data: DataConfig | None = None, precision: PrecisionConfig | None = None) -> TrainConfig:
        """Returns the config so far for one process that starts from fresh weights, with this many images in one forward pass and step."""
        config = self.found.config
        parts = {"data": data or config.data, "precision": precision or config.precision}
        # One process has no ranks to share statistics with.
        parts["precision"] = replace(parts["precision"], bn_ranks=0)
        # Fresh weights compute as fast as trained ones, and need no file.
        return replace(config, global_batch=batch, rank_batch=0, init_from="", **parts)

    def stepper(self, batch: int, *, precision: PrecisionConfig | None = None) -> Stepper:
        """Returns networks of their own for `trial_config`."""
        return self.make_stepper(self.trial_config(batch, precision=precision), self.process)

    def compare(self, title: str, trials: Sequence[Trial]) -> Comparison:
        """Announces the comparison, runs it, and frees the memory of failed candidates."""
        self.announce(f"{title}: {', '.join(trial.name for trial in trials)}")
        comparison = compare(title, trials, seconds=self.request.seconds)
        release_memory()
        return comparison


def cores_per_rank(ranks: int, *, device: torch.device) -> int:
    """Returns how many cores each rank gets when the ranks on this machine share those of this process; at least 1."""
    here = min(ranks, torch.cuda.device_count()) if device.type == "cuda" else ranks
    return max(1, len(os.sched_getaffinity(0)) // here)
