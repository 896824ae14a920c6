"""What: the target's update after a step, over all parameters of encoder and projector (ResNet-50: 33.0 M in 164 tensors).

How: float32 on one thread, tau 0.99. Reference: the equation as solo-learn writes it, a tensor at a time: a new tensor tau t + (1 - tau) o.
Ceiling: `copy_` of the same tensors, the customary unit; it moves as many bytes as the update has to (a write first reads its cache line).

    python -m benchmarks.run ema

Why: nothing is computed to speak of, so passes over memory are all that counts. The reference makes three temporaries of each tensor, fresh
memory that the system has to clear first; mul_ and add_ (lightly's) pass twice; a lerp passes once, as a copy does. It may even come out below the
copy: it loads the lines that the copy only stores to, and loads are what a CPU prefetches best (one flat array shows the same).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.record import CaseResult, make_result
from benchmarks.rivals.updates import lightly_update, solo_learn_update
from benchmarks.timing import Subject, measure, torch_threads
from fastbyol.byol import build_byol
from fastbyol.config.schema import ModelConfig
from fastbyol.optim.ema import ema_update

REFERENCE, CEILING, OURS = "solo-learn's loop", "copy_", "fastbyol ema_update"
TAU = 0.99


@dataclass(frozen=True)
class Size:
    rounds: int
    calls: int = 1
    """In a round."""
    model: ModelConfig = field(default_factory=ModelConfig)


QUICK = Size(rounds=9, calls=2)
FULL = Size(rounds=21, calls=3)


def run(size: Size, *, scratch: Path) -> CaseResult:
    del scratch  # nothing is written
    byol = build_byol(size.model, num_classes=2)
    target = [parameter.detach() for parameter in byol.target.parameters()]
    online = [p.detach() + 0.01 for module in (byol.online.encoder, byol.online.projector) for p in module.parameters()]
    subjects = [
        Subject(CEILING, lambda: torch._foreach_copy_(target, online), calls=size.calls),
        Subject(OURS, lambda: ema_update(target, online, TAU), calls=size.calls),
        Subject("lightly's two passes", lambda: lightly_update(target, online, TAU), calls=size.calls),
        Subject(REFERENCE, lambda: solo_learn_update(target, online, TAU), calls=size.calls),
    ]
    with torch_threads(1), torch.no_grad():
        timings = measure(subjects, rounds=size.rounds, warmup=2)
    numbers = sum(t.numel() for t in target)
    return make_result(
        "ema",
        f"the target's update, {numbers / 1e6:.1f} M parameters in {len(target)} tensors",
        subjects,
        timings,
        reference=REFERENCE,
        ceiling=CEILING,
        unit="update",
        threads=1,
        settings=size,
    )
