"""Measures one LARS step on the device over the online network with its predictor (ResNet-50: 35.1 M in 169 tensors), gradients given.

How: float32; all subjects update the same parameters from the same gradients, each with its own momentum buffers. Reference:
torch-optimizer's LARS if installed, else the rule one tensor at a time. Ceiling: `copy_` of the parameters' bytes. Then ours, as a
CUDA graph, and followed by the target's update.

    python -m benchmarks.gpu_plan lars

Why: the rule moves 7 streams where a copy has 2 or 3. Other libraries add temporaries, about 1,300 launches, and `if norm != 0`,
which makes the host wait for the device twice for each of 57 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from benchmarks.gpu import Place
from benchmarks.gpu.subjects import ENOUGH_S, captures, device_subject
from benchmarks.record import CaseResult, make_result
from benchmarks.rivals.updates import lars_by_tensor
from benchmarks.timing import measure
from fastbyol.byol import BYOL, build_byol
from fastbyol.config.errors import UserError
from fastbyol.config.schema import ModelConfig, OptimConfig
from fastbyol.optim.build import build_optimizer
from fastbyol.optim.ema import ema_update
from fastbyol.optim.lars import LARS

CEILING, BY_TENSOR, RIVAL, OURS = "copy_", "the rule, a tensor at a time", "torch-optimizer LARS", "fastbyol LARS.step"
LR, TAU = 1e-3, 0.99


@dataclass(frozen=True)
class Size:
    rounds: int
    model: ModelConfig = field(default_factory=ModelConfig)
    enough_s: float = ENOUGH_S


FULL = Size(rounds=15)
TINY = Size(rounds=1, model=ModelConfig(encoder="resnet8", stem="small2", hidden_dim=16, projection_dim=8), enough_s=0)


def run(size: Size, *, place: Place) -> CaseResult:
    byol = build_byol(size.model, num_classes=2).to(place.device)
    params = [p for p in byol.online.parameters() if p.requires_grad]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    skipped: dict[str, str] = {}
    work = _updates(byol, params) | _rivals(byol, skipped) | _graph(byol, place, skipped)
    subjects = [device_subject(name, do, device=place.device, enough_s=size.enough_s) for name, do in work.items()]
    timings = measure(subjects, rounds=size.rounds)
    return make_result(
        "gpu.lars",
        f"one LARS step, {sum(p.numel() for p in params) / 1e6:.1f} M parameters in {len(params)} tensors",
        subjects,
        timings,
        reference=RIVAL if RIVAL in work else BY_TENSOR,
        ceiling=CEILING,
        unit="step",
        threads=torch.get_num_threads(),
        primary="wall",
        settings=size,
        skipped=skipped,
        device=place.device.type,
    )


def _updates(byol: BYOL, params: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
    copies = [torch.zeros_like(p) for p in params]
    source = [p.detach() for p in params]
    ours, before_target, with_target = (cast(LARS, _optimizer(byol, "lars")) for _ in range(3))
    target = [*byol.target.encoder.parameters(), *byol.target.projector.parameters()]
    online = [*byol.online.encoder.parameters(), *byol.online.projector.parameters()]

    def one_after_the_other() -> None:
        before_target.step()
        ema_update(target, online, TAU)

    return {
        CEILING: lambda: torch._foreach_copy_(copies, source),
        BY_TENSOR: lars_by_tensor(params, lr=LR),
        OURS: ours.step,
        "LARS.step, then ema_update": one_after_the_other,
        "LARS.step(target_update=...)": lambda: with_target.step(target_update=byol.target_update(TAU)),
    }


def _rivals(byol: BYOL, skipped: dict[str, str]) -> dict[str, Callable[[], object]]:
    try:
        return {RIVAL: _optimizer(byol, "torch_optimizer_lars").step}
    except UserError as error:
        skipped[RIVAL] = str(error)
        return {}


def _graph(byol: BYOL, place: Place, skipped: dict[str, str]) -> dict[str, Callable[[], object]]:
    if place.device.type != "cuda":
        skipped["CUDA graph"] = "needs CUDA"
        return {}
    optimizer = _optimizer(byol, "lars")
    for group in optimizer.param_groups:
        group["lr"] = torch.full((), LR, device=place.device)  # a Python number would become a constant of the graph
    return captures({f"{OURS}, CUDA graph": optimizer.step}, place.device, skipped)


def _optimizer(byol: BYOL, name: str) -> torch.optim.Optimizer:
    """Returns the product's optimizer over the online network, with a learning rate so small that thousands of steps change little."""
    optimizer = build_optimizer(OptimConfig(name=name), byol.online)
    for group in optimizer.param_groups:
        group["lr"] = LR
    return optimizer
