"""What all measurements share: the request, this machine's share of the run, and what was found so far."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fastbyol.config.schema import DataConfig, OptimConfig, PrecisionConfig, TrainConfig
from fastbyol.data.batch import ViewBatch
from fastbyol.process_group import Process
from fastbyol.tuning.comparison import Comparison, Trial, compare
from fastbyol.tuning.memory import release_memory
from fastbyol.tuning.verdict import Speeds


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        config: of the run to come; its data.train is not read.
        paths: the same images, one path for each way they are stored.
        ranks: processes of the run, one per GPU; None: one for each GPU here, or one on a CPU.
        seconds: for each comparison.
        kept: dotted names of options that are not tuned.
    """

    config: TrainConfig
    paths: Sequence[str]
    ranks: int | None = None
    seconds: float = 10.0
    kept: frozenset[str] = frozenset()


@dataclass
class Findings:
    """What was measured and chosen so far.

    config: the run with the best settings so far. per: what images per second are counted by. notes: by dotted name, why a setting is as it is.
    lines: the conclusion in words.
    """

    config: TrainConfig
    per: str
    ranks: int
    comparisons: list[Comparison] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    speeds: Speeds | None = None
    lines: list[str] = field(default_factory=list)

    def add(self, comparison: Comparison, *names: str) -> str:
        """Keeps the comparison, as the reason for these settings too; its best candidate."""
        self.comparisons.append(comparison)
        for name in names:
            self.notes[name] = "; ".join([self.notes.get(name, f"images/s per {self.per}"), comparison.summary])
        return comparison.best

    def choose(
        self,
        *,
        precision: PrecisionConfig | None = None,
        data: DataConfig | None = None,
        rank_batch: int | None = None,
        optim: OptimConfig | None = None,
    ) -> None:
        """Takes over what is given."""
        given = {"precision": precision, "data": data, "rank_batch": rank_batch, "optim": optim}
        self.config = replace(self.config, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def command(self, path: Path) -> str:
        """What starts the run from the file at the path."""
        start = ["torchrun", "--nproc-per-node", str(self.ranks)] if self.ranks > 1 else ["python"]
        return shlex.join([*start, "fastbyol/train.py", "--config", str(path), "--out", "runs/tuned"])


@dataclass(frozen=True)
class Bench:
    """One process that works as one rank of the run would, without the messages between ranks."""

    request: Request
    process: Process
    share: int
    """Images per optimizer step of one rank."""
    cores: int
    """Of this machine, for one rank."""
    found: Findings
    announce: Callable[[str], None]
    sample: list[ViewBatch] = field(default_factory=list)
    """One batch of real images, once `data` has been opened."""

    @property
    def on_gpu(self) -> bool:
        return self.process.device.type == "cuda"

    @property
    def micro_batch(self) -> int:
        """Images of one forward in the config so far."""
        return self.found.config.rank_batch or self.share

    def keeps(self, name: str) -> bool:
        """Whether the user has set this option."""
        return name in self.request.kept

    def trial_config(self, batch: int, *, data: DataConfig | None = None, precision: PrecisionConfig | None = None) -> TrainConfig:
        """The config so far for one process, with this many images in one forward and step, from fresh weights."""
        config = self.found.config
        return replace(
            config,
            global_batch=batch,
            rank_batch=0,
            init_from="",
            data=data or config.data,
            precision=precision or config.precision,
        )

    def compare(self, title: str, trials: Sequence[Trial]) -> Comparison:
        """Says what is measured, measures it, and gives back memory of what failed."""
        self.announce(f"{title}: {', '.join(trial.name for trial in trials)}")
        comparison = compare(title, trials, seconds=self.request.seconds)
        release_memory()
        return comparison


def cores_per_rank(ranks: int, *, device: torch.device) -> int:
    """Cores that this process may use, shared by the ranks that will run on this machine; at least 1."""
    here = min(ranks, torch.cuda.device_count()) if device.type == "cuda" else ranks
    return max(1, len(os.sched_getaffinity(0)) // here)
