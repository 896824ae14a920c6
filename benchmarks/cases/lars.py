"""What: one LARS step over the online network with its predictor (ResNet-50: 35.1 M in 169 tensors), gradients given.

How: float32 on one thread; all subjects update the same parameters from the same gradients, each with a momentum buffer of its own.
Reference: torch-optimizer's LARS (lightly's and solo-learn's do the same operations). Ceiling: `copy_` of the parameters' bytes.

    python -m benchmarks.run lars

Why: memory again. The rule reads w and g for the norms, and then reads w, g, m and writes w, m: 7 streams where a copy has 3, so 2.33 x a
copy is the limit of an implementation that keeps nothing in cache; ours takes the norms and the update of a tensor close together, so that
a part of w and g is still there. What others need above that are further passes and temporaries the size of the network. On a GPU, the
reference's `if norm != 0` costs two synchronisations for each of 57 weights besides; ours has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.record import CaseResult, make_result
from benchmarks.timing import Subject, measure, torch_threads
from fastbyol.byol import build_byol
from fastbyol.config.schema import ModelConfig, OptimConfig
from fastbyol.optim.build import build_optimizer
from fastbyol.optim.lars import lars_step_reference

REFERENCE, CEILING, OURS = "torch-optimizer LARS", "copy_", "fastbyol LARS.step"
LR = 1e-3


@dataclass(frozen=True)
class Size:
    rounds: int
    calls: int = 1
    """In a round."""
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
    ours, rival = (_optimizer(online, name) for name in ("lars", "torch_optimizer_lars"))
    copies = [torch.zeros_like(p) for p in params]
    momenta = [torch.zeros_like(p) for p in params]
    detached = [p.detach() for p in params]
    subjects = [
        Subject(CEILING, lambda: torch._foreach_copy_(copies, detached), calls=size.calls),
        Subject(OURS, ours.step, calls=size.calls),
        Subject("the rule, a tensor at a time", lambda: _step_by_tensor(params, momenta), calls=size.calls, note="two host syncs a tensor"),
        Subject(REFERENCE, rival.step, calls=size.calls, note="another rule: see optim/lars.py"),
    ]
    with torch_threads(1):
        timings = measure(subjects, rounds=size.rounds, warmup=2)
    return make_result(
        "lars",
        f"one LARS step, {sum(p.numel() for p in params) / 1e6:.1f} M parameters in {len(params)} tensors",
        subjects,
        timings,
        reference=REFERENCE,
        ceiling=CEILING,
        unit="step",
        threads=1,
        settings=size,
    )


def _optimizer(online: torch.nn.Module, name: str) -> Optimizer:
    """The product's, with a learning rate at which nothing moves far in a few hundred steps."""
    optimizer = build_optimizer(OptimConfig(name=name), online)
    for group in optimizer.param_groups:
        group["lr"] = LR
    return optimizer


def _step_by_tensor(params: Sequence[Tensor], momenta: Sequence[Tensor]) -> None:
    config = OptimConfig()
    for param, buffer in zip(params, momenta, strict=True):
        grad = param.grad
        assert grad is not None
        lars_step_reference(
            param,
            grad,
            buffer,
            lr=LR,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            trust_coefficient=config.trust_coefficient,
            adapt=param.ndim > 1,
        )
