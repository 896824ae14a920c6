"""Measures one LARS step on the device over the online network with its predictor (ResNet-50: 35.1 M in 169 tensors), gradients given.

How: float32; all subjects update the same parameters from the same gradients, each with its own momentum buffers. Reference:
torch-optimizer's LARS if installed, else the rule one tensor at a time. Ceiling: `copy_` of the parameters' bytes. Then ours, as a
CUDA graph, and followed by the target's update.

    python -m benchmarks.gpu_plan lars

Why: the rule moves 7 streams where a copy has 2 or 3. Other libraries add temporaries, about 1,300 launches, and `if norm != 0`,
which makes the host wait for the device twice for each of 57 weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.gpu import TINY_MODEL, Place
from benchmarks.gpu.subjects import ENOUGH_S, captures, device_subject, part_result
from benchmarks.packages import those_installed
from benchmarks.record import CaseResult
from benchmarks.timing import measure
from benchmarks.updates import LR, OnlineUpdates, lars_by_tensor
from fastbyol.config.schema import ModelConfig

CEILING, BY_TENSOR, RIVAL, OURS = "copy_", "the rule, a tensor at a time", "torch-optimizer LARS", "fastbyol LARS.step"


@dataclass(frozen=True)
class Size:
    rounds: int
    model: ModelConfig = field(default_factory=ModelConfig)
    enough_s: float = ENOUGH_S


FULL = Size(rounds=15)
TINY = Size(rounds=1, model=TINY_MODEL, enough_s=0)


def run(size: Size, *, place: Place) -> CaseResult:
    updates = OnlineUpdates(size.model, device=place.device)
    skipped: dict[str, str] = {}
    work: dict[str, Callable[[], object]] = {
        CEILING: updates.copy(),
        BY_TENSOR: lars_by_tensor(updates.params, lr=LR),
        OURS: updates.optimizer().step,
        "LARS.step, then ema_update": updates.lars_then_target(),
        "LARS.step(target_update=...)": updates.lars_with_target(),
        **those_installed({RIVAL: lambda: updates.optimizer("torch_optimizer_lars").step}, skipped),
    }
    if place.device.type == "cuda":
        lr = torch.full((), LR, device=place.device)  # a Python number would become a constant of the graph
        work |= captures({f"{OURS}, CUDA graph": updates.optimizer(lr=lr).step}, place.device, skipped)
    else:
        skipped["CUDA graph"] = "needs CUDA"
    subjects = [device_subject(name, do, device=place.device, enough_s=size.enough_s) for name, do in work.items()]
    timings = measure(subjects, rounds=size.rounds)
    title = f"one LARS step, {sum(p.numel() for p in updates.params) / 1e6:.1f} M parameters in {len(updates.params)} tensors"
    reference = BY_TENSOR if RIVAL in skipped else RIVAL
    return part_result(
        "lars", title, subjects, timings, reference=reference, ceiling=CEILING, unit="step", settings=size, place=place, skipped=skipped
    )
