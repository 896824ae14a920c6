"""What: all that follows a backward: LARS over the online network (ResNet-50: 35.1 M in 169 tensors), then the target's update (33.0 M in 164).

How: float32, gradients given, channels-last. Ours in one pass (`lars_ema`, what `train_step` does), ours one after the other, and LARS alone.
Reference: torch-optimizer's LARS, then solo-learn's loop over the target. Ceiling: `copy_` of the 35.1 M. The figures are of one thread;
the last column repeats 'x ceiling' with two threads, and with one while a process of ours copies memory on another core, each against a copy
under the same conditions ('x copy', medians of same-round ratios, wall clock).

    python -m benchmarks.run fused_update

Why: memory. In two steps w is read once more than in one: 10 streams where a copy has 3, so 3.33 x a copy without a cache, and 9 or 3.0 x in one
pass. A part of w and g is still in cache after the norms, which brings the pass below that. Two threads help a copy, and hurt what is made of
many small parallel regions; our updates keep to one thread (`one_thread_on_cpu`). On a GPU the two run one after the other (not measured yet).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.record import CaseResult, make_result
from benchmarks.rivals.updates import solo_learn_update
from benchmarks.timing import Subject, Timings, measure, same_round_ratios, torch_threads
from fastbyol.byol import build_byol
from fastbyol.config.schema import ModelConfig, OptimConfig
from fastbyol.optim.build import build_optimizer
from fastbyol.optim.ema import ema_update
from fastbyol.optim.lars import LARS, lars_ema

REFERENCE, CEILING, OURS = "torch-optimizer LARS, solo-learn loop", "copy_", "fastbyol lars_ema"
LR, TAU = 1e-3, 0.99
_COPY_FOR_EVER = "import numpy; a = numpy.zeros(1 << 24); b = a.copy()\nwhile True: b[:] = a"


@dataclass(frozen=True)
class Size:
    rounds: int
    calls: int = 1
    """In a round."""
    model: ModelConfig = field(default_factory=ModelConfig)


QUICK = Size(rounds=6)
FULL = Size(rounds=15, calls=2)


def run(size: Size, *, scratch: Path) -> CaseResult:
    del scratch  # nothing is written
    subjects = _subjects(size)
    with torch_threads(1):
        timings = measure(subjects, rounds=size.rounds, warmup=2)
        with _other_core_busy():
            busy = measure(subjects, rounds=size.rounds)
    with torch_threads(2):
        two = measure(subjects, rounds=size.rounds)
    return make_result(
        "fused_update",
        "LARS and the target's update of one step",
        subjects,
        timings,
        reference=REFERENCE,
        ceiling=CEILING,
        unit="step",
        threads=1,
        settings=size,
        extra={
            subject.name: {
                "x copy, two threads": _times_copy(two, subject.name),
                "x copy, other core busy": _times_copy(busy, subject.name),
            }
            for subject in subjects
        },
    )


def _subjects(size: Size) -> Sequence[Subject]:
    byol = build_byol(size.model, num_classes=2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(0)
    for param in byol.online.parameters():
        param.grad = 1e-3 * torch.randn(param.shape, generator=generator).contiguous(memory_format=_order_of(param))
    source = [p.detach() for p in byol.online.parameters()]
    copies = [torch.empty_like(p) for p in source]
    target = [p.detach() for p in byol.target.parameters()]
    online = [p for module in (byol.online.encoder, byol.online.projector) for p in module.parameters()]
    detached = [p.detach() for p in online]
    ours, rival = (build_optimizer(OptimConfig(name=name), byol.online) for name in ("lars", "torch_optimizer_lars"))
    for optimizer in (ours, rival):
        for group in optimizer.param_groups:
            group["lr"] = LR
    assert isinstance(ours, LARS)

    def one_after_the_other() -> None:
        ours.step()
        ema_update(target, detached, TAU)

    def as_rivals_do() -> None:
        rival.step()
        solo_learn_update(target, detached, TAU)

    return [
        Subject(CEILING, lambda: torch._foreach_copy_(copies, source), calls=size.calls),
        Subject(OURS, lambda: lars_ema(ours, target=target, online=online, tau=TAU), calls=size.calls),
        Subject("fastbyol LARS.step, then ema_update", one_after_the_other, calls=size.calls),
        Subject("fastbyol LARS.step alone", ours.step, calls=size.calls, note="no target"),
        Subject(REFERENCE, as_rivals_do, calls=size.calls, note="another rule: see optim/lars.py"),
    ]


def _order_of(param: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if param.ndim == 4 else torch.contiguous_format


def _times_copy(timings: dict[str, Timings], name: str) -> float:
    return same_round_ratios(timings[name].ms["wall"], timings[CEILING].ms["wall"]).median


@contextmanager
def _other_core_busy() -> Iterator[None]:
    """A process of ours copies 128 MiB again and again inside."""
    process = subprocess.Popen([sys.executable, "-c", _COPY_FOR_EVER])
    try:
        yield
    finally:
        process.kill()
        process.wait()
