"""Measures one LARS step over the online network with its predictor (ResNet-50: 35.1 M in 169 tensors), gradients given.

How: float32 on one thread; all subjects update the same parameters from the same gradients, each with its own momentum buffer.
Reference: torch-optimizer's LARS, or the rule one tensor at a time if that is not installed; rival: lightly's. Ceiling: `copy_` of
the parameters' bytes. The other libraries divide by |g| + wd |w|, where the official code has |g + wd w|: another rule with as many
passes (`optim/build.py`).

    python -m benchmarks.run lars

Why: memory bandwidth again. The rule reads w and g for the norms, then reads w, g, m and writes w, m: 7 streams where a copy has 3,
so 2.33 x a copy is the limit of an implementation that keeps nothing in cache. Ours takes the norms and the update of a tensor close
together, so part of w and g is still in cache. The rest of the other libraries' time goes into further passes and temporaries the
size of the network. On a GPU, the reference's `if norm != 0` also costs two synchronisations for each of 57 weights; ours has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from benchmarks.record import CaseResult, make_result
from benchmarks.rivals.packages import those_installed
from benchmarks.rivals.updates import lars_by_tensor, lightly_lars, torch_optimizer_lars
from benchmarks.timing import Subject, measure, torch_threads
from fastbyol.byol import build_byol
from fastbyol.config.schema import ModelConfig, OptimConfig
from fastbyol.optim.build import build_optimizer

RIVAL, LIGHTLY, BY_TENSOR = "torch-optimizer LARS", "lightly LARS", "the rule, a tensor at a time"
CEILING, OURS = "copy_", "fastbyol LARS.step"
ANOTHER_RULE = "another rule: |g| + wd |w|"
LR = 1e-3


@dataclass(frozen=True)
class Size:
    rounds: int
    calls: int = 1
    """Calls per round."""
    model: ModelConfig = field(default_factory=ModelConfig)


QUICK = Size(rounds=6)
FULL = Size(rounds=21, calls=2)


def run(size: Size, *, scratch: Path) -> CaseResult:
    del scratch  # nothing is written
    online = build_byol(size.model, num_classes=2).online
    params = [p for p in online.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 1e-3
    ours = build_optimizer(OptimConfig(), online)
    for group in ours.param_groups:
        group["lr"] = LR
    copies = [torch.zeros_like(p) for p in params]
    detached = [p.detach() for p in params]
    subjects = [
        Subject(CEILING, lambda: torch._foreach_copy_(copies, detached), calls=size.calls),
        Subject(OURS, ours.step, calls=size.calls),
        Subject(BY_TENSOR, lars_by_tensor(params, lr=LR), calls=size.calls, note="two host syncs a tensor", role="rival"),
    ]
    skipped: dict[str, str] = {}
    rivals = those_installed(_rivals(online), skipped)
    subjects += [Subject(name, step, calls=size.calls, note=ANOTHER_RULE, role="rival") for name, step in rivals.items()]
    with torch_threads(1):
        timings = measure(subjects, rounds=size.rounds, warmup=2)
    return make_result(
        "lars",
        f"one LARS step, {sum(p.numel() for p in params) / 1e6:.1f} M parameters in {len(params)} tensors",
        subjects,
        timings,
        reference=RIVAL if RIVAL in rivals else BY_TENSOR,
        ceiling=CEILING,
        unit="step",
        threads=1,
        settings=size,
        skipped=skipped,
    )


def _rivals(online: nn.Module) -> dict[str, Callable[[], Callable[[], object]]]:
    return {RIVAL: lambda: torch_optimizer_lars(online, lr=LR), LIGHTLY: lambda: lightly_lars(online, lr=LR)}
