"""Measures the cost of monitoring a run: the share of a step that goes into `Monitor` and `RunLog`.

How: the calls that the training loop makes between two records by default, with one step logged (norms, signs of collapse, one read,
a line each to metrics.jsonl, TensorBoard and train.log), on the outputs and gradients of a real step of ResNet-50. Reference: the
same with every step logged. Ceiling: a step itself, of which ours should take less than 1 %.

    python -m benchmarks.run monitors

Why: most of the cost is the two norms, three passes over the weights and one over the gradients, on logged steps only; sums over
micro-batches are a few additions. The step's time grows with the batch and the norms' does not, so this small batch is the hard case.
On a GPU all of it is queued behind the step and read once per record (not measured yet).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from benchmarks.record import CaseResult, measured
from benchmarks.timing import Subject, torch_threads
from benchmarks.training_step import CPU, StepSize, TrainingStep
from fastbyol.byol import BYOLOutput
from fastbyol.config.schema import ModelConfig, TrainConfig
from fastbyol.monitors import build_monitor
from fastbyol.ranks.process_group import Process
from fastbyol.run.log import RunLog, close_logging
from fastbyol.run.precision import autocast

OURS, REFERENCE, CEILING = "one step in ten logged", "every step logged", "the step: four forwards, backward"
LOG_EVERY = TrainConfig().log_every
NUM_CLASSES, TOTAL_STEPS = 10, 1000


@dataclass(frozen=True)
class Size(StepSize):
    threads: int = 1


QUICK = Size(model=ModelConfig(encoder="resnet18"), size_px=64, batch=16, rounds=6)
FULL = Size(model=ModelConfig(), size_px=64, batch=16, rounds=15)


def run(size: Size, *, scratch: Path) -> CaseResult:
    config = size.config()
    with torch_threads(size.threads), log_to_files(scratch, config) as run_log:
        watched = Watched(config, run_log)
        subjects = [
            Subject(CEILING, watched.compute, note="without the optimizer's update"),
            Subject(OURS, lambda: watched.watch(log_every=LOG_EVERY), units=LOG_EVERY),
            Subject(REFERENCE, lambda: watched.watch(log_every=1), units=LOG_EVERY),
        ]
        title = f"watching a step of {size.model.encoder}, {size.size_px} px, batch {size.batch}"
        result = measured(
            "monitors", title, subjects, reference=REFERENCE, ceiling=CEILING, unit="step", threads=size.threads, settings=size
        )
    step_ms = result.row(CEILING).ms["cpu"].median
    shares = {name: result.row(name).over_ceiling["cpu"].median for name in (OURS, REFERENCE)}
    return result.with_extra({name: {"% of a step": 100 * share, "of CPU-ms": step_ms} for name, share in shares.items()})


@contextmanager
def log_to_files(folder: Path, config: TrainConfig) -> Iterator[RunLog]:
    """Opens a run log whose screen output goes to a file too, as in a batch job."""
    with (folder / "stderr").open("w") as screen:
        with redirect_stderr(screen):
            run_log = RunLog(folder, config, total_steps=TOTAL_STEPS, first_step=0)
        try:
            yield run_log
        finally:
            run_log.close()
            close_logging()


class Watched:
    """A step's forward and backward, and separately the monitor's calls for it."""

    def __init__(self, config: TrainConfig, run_log: RunLog) -> None:
        step = TrainingStep(config, num_classes=NUM_CLASSES)
        self._config, self._run_log, self._byol, self._batch = config, run_log, step.networks().byol, step.noise
        self._monitor = build_monitor(config, Process(rank=0, world_size=1, device=CPU))
        self._output = self.compute()

    def compute(self) -> BYOLOutput:
        """Runs four forward passes and the backward; the gradients stay."""
        self._byol.zero_grad(set_to_none=True)
        with autocast(self._config.precision, device=CPU):
            output: BYOLOutput = self._byol(self._batch.view1, self._batch.view2, self._batch.label)
        (output.loss + output.probe_loss).backward()
        self._output = output
        return output

    def watch(self, *, log_every: int) -> None:
        """Makes all monitor calls of `LOG_EVERY` steps, in the order of `train_step`, without the steps."""
        for step in range(LOG_EVERY):
            logged = (step + 1) % log_every == 0
            self._monitor.start_step(logged=logged)
            with self._monitor.waiting():  # its clock is read here even if nothing waits
                pass
            self._monitor.add(self._output)
            self._monitor.gradients_ready(self._byol.online)
            self._monitor.step()
            if logged:
                self._run_log.write(self._monitor.record(step=step, epoch=0.0, lr=0.1, tau=0.99, last=self._output))
