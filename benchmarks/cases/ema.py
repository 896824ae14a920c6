"""Measures the target's update after a step, over all parameters of encoder and projector (ResNet-50: 33.0 M in 164 tensors).

How: float32 on one thread, tau 0.99. Reference: the equation as solo-learn writes it, one tensor at a time: a new tensor tau t + (1 -
tau) o. Ceiling: `copy_` of the same tensors, the usual unit; it moves as many bytes as the update must (a write first reads its cache
line). Rivals, if installed: lightly's update_momentum and ema-pytorch (its default loop, and its option use_foreach), the latter with
its rate fixed at tau.

    python -m benchmarks.run ema

Why: there is hardly any arithmetic, so only passes over memory count. The reference makes three temporaries per tensor, in fresh
memory that the system has to clear first; mul_ and add_ (lightly's) pass twice; a lerp (ema-pytorch's too) passes once, as a copy
does. It may even be faster than the copy: it loads the lines that the copy only stores to, and a CPU prefetches loads best (one flat
array shows the same).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.packages import those_installed
from benchmarks.record import CaseResult, make_result
from benchmarks.timing import Subject, measure, torch_threads
from benchmarks.updates import TAU, ema_pytorch_update, lightly_update, solo_learn_update, target_and_online
from fastbyol.config.schema import ModelConfig
from fastbyol.optim.ema import ema_update

REFERENCE, CEILING, OURS = "solo-learn's loop", "copy_", "fastbyol ema_update"
LIGHTLY, EMA_PYTORCH, EMA_PYTORCH_FOREACH = "lightly update_momentum", "ema-pytorch", "ema-pytorch, use_foreach"
NOTES = {name: "buffers of batch norm too" for name in (EMA_PYTORCH, EMA_PYTORCH_FOREACH)}


@dataclass(frozen=True)
class Size:
    rounds: int
    calls: int = 1
    """Calls per round."""
    model: ModelConfig = field(default_factory=ModelConfig)


QUICK = Size(rounds=9, calls=2)
FULL = Size(rounds=21, calls=3)


def run(size: Size, *, scratch: Path) -> CaseResult:
    del scratch  # nothing is written
    follower, followed = target_and_online(size.model)
    target, online = ([parameter.detach() for parameter in network.parameters()] for network in (follower, followed))
    skipped: dict[str, str] = {}
    makers = {
        LIGHTLY: lambda: lightly_update(follower, followed, TAU),
        EMA_PYTORCH: lambda: ema_pytorch_update(follower, followed, TAU, use_foreach=False),
        EMA_PYTORCH_FOREACH: lambda: ema_pytorch_update(follower, followed, TAU, use_foreach=True),
    }
    subjects = [
        Subject(CEILING, lambda: torch._foreach_copy_(target, online), calls=size.calls),
        Subject(OURS, lambda: ema_update(target, online, TAU), calls=size.calls),
        Subject(REFERENCE, lambda: solo_learn_update(target, online, TAU), calls=size.calls),
        *(
            Subject(name, update, calls=size.calls, note=NOTES.get(name, ""), role="rival")
            for name, update in those_installed(makers, skipped).items()
        ),
    ]
    with torch_threads(1), torch.no_grad():
        timings = measure(subjects, rounds=size.rounds, warmup=2)
    title = f"the target's update, {sum(t.numel() for t in target) / 1e6:.1f} M parameters in {len(target)} tensors"
    return make_result(
        "ema", title, subjects, timings, reference=REFERENCE, ceiling=CEILING, unit="update", threads=1, settings=size, skipped=skipped
    )
