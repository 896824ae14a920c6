"""Measures the target's update on the device, over all parameters of encoder and projector (ResNet-50: 33.0 M in 164 tensors).

How: float32. Reference: the equation one tensor at a time, as in most code. Ceiling: `copy_` of the same tensors, which moves two
thirds of the bytes that the update must (GB/s: the update's three streams over its time). Then ours with each back end, and as a CUDA
graph.

    python -m benchmarks.gpu_plan ema

Why: memory bandwidth again, but with one or more launches per tensor there are also 164 to 656 launches; the fused forms have a few,
a graph has one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch

from benchmarks.gpu import TINY_MODEL, Place
from benchmarks.gpu.subjects import ENOUGH_S, captures, device_subject, part_result, why_it_fails
from benchmarks.record import CaseResult
from benchmarks.timing import measure
from benchmarks.updates import TAU, target_and_online
from fastbyol.config.schema import UPDATES, ModelConfig
from fastbyol.optim.ema import ema_update, ema_update_reference

REFERENCE, CEILING = "the equation, a tensor at a time", "copy_"
STREAMS = 3
"""Memory streams: read the target and the online tensor, write the target."""


@dataclass(frozen=True)
class Size:
    rounds: int
    model: ModelConfig = field(default_factory=ModelConfig)
    enough_s: float = ENOUGH_S


FULL = Size(rounds=15)
TINY = Size(rounds=1, model=TINY_MODEL, enough_s=0)


@torch.no_grad()
def run(size: Size, *, place: Place) -> CaseResult:
    target, online = ([p.detach() for p in network.parameters()] for network in target_and_online(size.model, device=place.device))
    skipped: dict[str, str] = {}
    work: dict[str, Callable[[], object]] = {
        CEILING: lambda: torch._foreach_copy_(target, online),
        REFERENCE: lambda: ema_update_reference(target, online, TAU),
    }
    for backend in [update for update in UPDATES if update != "auto"]:
        update = partial(ema_update, target, online, TAU, backend=backend)
        if why := why_it_fails(update):
            skipped[backend] = why
        else:
            work[f"ema_update, {backend}"] = update
    if place.device.type == "cuda":
        tau = torch.full((), TAU, device=place.device)  # a graph follows changes of a tensor; a number becomes its constant
        graphs: dict[str, Callable[[], object]] = {
            "ema_update, foreach, CUDA graph": lambda: ema_update(target, online, TAU),
            "ema_update, foreach, tau a tensor, CUDA graph": lambda: ema_update(target, online, tau),
        }
        work |= captures(graphs, place.device, skipped)
    else:
        skipped["CUDA graphs"] = "need CUDA"
    subjects = [device_subject(name, do, device=place.device, enough_s=size.enough_s) for name, do in work.items()]
    timings = measure(subjects, rounds=size.rounds)
    gigabytes = STREAMS * sum(t.numel() * t.element_size() for t in target) / 1e9
    rate = {name: {"GB/s": 1000 * gigabytes / median(timings[name].ms["wall"])} for name in work if name != CEILING}
    title = f"the target's update, {sum(t.numel() for t in target) / 1e6:.1f} M parameters in {len(target)} tensors"
    return part_result(
        "ema",
        title,
        subjects,
        timings,
        reference=REFERENCE,
        ceiling=CEILING,
        unit="update",
        settings=size,
        place=place,
        extra=rate,
        skipped=skipped,
    )
