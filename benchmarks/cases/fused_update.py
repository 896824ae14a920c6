"""Measures everything after a backward: LARS over the online network (ResNet-50: 35.1 M in 169 tensors), then the target's update (33.0
M in 164).

How: float32, gradients given, channels-last. Ours in one pass (`optimizer.step(target_update=...)`, the very call of `train_step`; the
row keeps its name of earlier records), ours one after the other, and LARS alone. Reference: torch-optimizer's LARS (if it is not
installed, the rule one tensor at a time), then solo-learn's loop over the target. Rival: lightly's LARS and update_momentum.
Ceiling: `copy_` of the 35.1 M. The figures are for one thread; the last column repeats 'x ceiling' with two threads, and with one while another
process of ours copies memory on another core, each relative to a copy under the same conditions ('x copy', medians of same-round
ratios, wall clock).

    python -m benchmarks.run fused_update

Why: memory bandwidth. Two separate steps read w once more than one: 10 streams, where a copy has 3, so 3.33 x a copy without a cache;
one pass has 9, or 3.0 x. Part of w and g is still in cache after the norms, which brings the pass below that. With two threads, each
takes the next tensor when it has finished one (`host/kernel_threads.py`): no barrier waits for a busy core, and the result is bitwise the
same. torch's own operations, including the separate target update, use one thread (`one_thread_on_cpu`), because their many small
parallel regions are slow on a busy machine. On a GPU the two run one after the other (not measured yet).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.packages import those_installed
from benchmarks.record import CaseResult, make_result
from benchmarks.timing import Subject, Timings, measure, same_round_ratios, torch_threads
from benchmarks.updates import LR, OnlineUpdates, lars_by_tensor
from fastbyol.config.schema import ModelConfig

RIVAL, LIGHTLY = "torch-optimizer LARS, solo-learn loop", "lightly LARS, update_momentum"
BY_TENSOR = "the rule and the equation, a tensor at a time"
CEILING, OURS = "copy_", "fastbyol lars_ema"  # not renamed: `benchmarks.compare` and README find the row by it
ANOTHER_RULE = "another rule: |g| + wd |w|"
_COPY_FOR_EVER = "import numpy; a = numpy.zeros(1 << 24); b = a.copy()\nwhile True: b[:] = a"


@dataclass(frozen=True)
class Size:
    rounds: int
    more_rounds: int = 6
    """Rounds with the other core busy, and with two threads."""
    calls: int = 1
    """Calls per round."""
    model: ModelConfig = field(default_factory=ModelConfig)


QUICK = Size(rounds=6, more_rounds=3)
FULL = Size(rounds=15, more_rounds=15, calls=2)


def run(size: Size, *, scratch: Path) -> CaseResult:
    del scratch  # nothing is written
    skipped: dict[str, str] = {}
    subjects = _subjects(size, skipped)
    with torch_threads(1):
        timings = measure(subjects, rounds=size.rounds, warmup=2)
        with _other_core_busy():
            busy = measure(subjects, rounds=size.more_rounds)
    with torch_threads(2):
        two = measure(subjects, rounds=size.more_rounds)
    extra = {
        subject.name: {"x copy, two threads": _times_copy(two, subject.name), "x copy, other core busy": _times_copy(busy, subject.name)}
        for subject in subjects
    }
    return make_result(
        "fused_update",
        "LARS and the target's update of one step",
        subjects,
        timings,
        reference=BY_TENSOR if RIVAL in skipped else RIVAL,
        ceiling=CEILING,
        unit="step",
        threads=1,
        settings=size,
        extra=extra,
        skipped=skipped,
    )


def _subjects(size: Size, skipped: dict[str, str]) -> list[Subject]:
    updates = OnlineUpdates(size.model, layout=torch.channels_last)
    makers = {RIVAL: lambda: updates.solo_learn_after(updates.optimizer("torch_optimizer_lars").step), LIGHTLY: updates.lightly}
    rivals = those_installed(makers, skipped)
    if RIVAL in skipped:
        rivals[BY_TENSOR] = updates.solo_learn_after(lars_by_tensor(updates.params, lr=LR))
    return [
        Subject(CEILING, updates.copy(), calls=size.calls),
        Subject(OURS, updates.lars_with_target(), calls=size.calls),
        Subject("fastbyol LARS.step, then ema_update", updates.lars_then_target(), calls=size.calls),
        Subject("fastbyol LARS.step alone", updates.optimizer().step, calls=size.calls, note="no target"),
        *(
            Subject(name, work, calls=size.calls, note="" if name == BY_TENSOR else ANOTHER_RULE, role="rival")
            for name, work in rivals.items()
        ),
    ]


def _times_copy(timings: dict[str, Timings], name: str) -> float:
    return same_round_ratios(timings[name].ms["wall"], timings[CEILING].ms["wall"]).median


@contextmanager
def _other_core_busy() -> Iterator[None]:
    """Runs another process that repeatedly copies 128 MiB, inside the block."""
    process = subprocess.Popen([sys.executable, "-c", _COPY_FOR_EVER])
    try:
        yield
    finally:
        process.kill()
        process.wait()
