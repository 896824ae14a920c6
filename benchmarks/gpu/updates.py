"""The parts `ema` and `lars`: what follows a backward, on the device, by the ways of `benchmarks/updates.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks import updates as ways
from benchmarks.gpu import TINY_MODEL, Place
from benchmarks.gpu.subjects import ENOUGH_S, captures, device_subjects, measured_part, why_it_fails
from benchmarks.record import CaseResult
from benchmarks.rivals import those_installed
from benchmarks.updates import BY_TENSOR, CEILING, LR, RIVAL, TAU, OnlineUpdates, lars_by_tensor, target_and_online
from fastbyol.config.schema import UPDATES, ModelConfig
from fastbyol.optim.ema import ema_update, ema_update_reference

STREAMS = 3
"""The target's update reads the target and the online tensor and writes the target."""


@dataclass(frozen=True)
class Size:
    rounds: int
    model: ModelConfig = field(default_factory=ModelConfig)
    enough_s: float = ENOUGH_S


FULL, TINY = Size(rounds=15), Size(rounds=1, model=TINY_MODEL, enough_s=0)


class Ema:
    """Measures the target's update on the device, over all parameters of encoder and projector (ResNet-50: 33.0 M in 164 tensors).

    How: float32. Reference: the equation one tensor at a time, as in most code. Ceiling: `copy_` of the same tensors, which moves two
    thirds of the bytes that the update must (GB/s: the update's three streams over its time). Then ours with each back end, and as a CUDA
    graph.

        python -m benchmarks.gpu_plan ema

    Why: memory bandwidth again, but with one or more launches per tensor there are also 164 to 656 launches; the fused forms have a few,
    a graph has one.
    """

    FULL, TINY = FULL, TINY

    @staticmethod
    @torch.no_grad()
    def run(size: Size, *, place: Place) -> CaseResult:
        target, online = ([p.detach() for p in network.parameters()] for network in target_and_online(size.model, device=place.device))
        skipped: dict[str, str] = {}
        reference = "the equation, a tensor at a time"
        work: dict[str, Callable[[], object]] = {
            CEILING: lambda: torch._foreach_copy_(target, online),
            reference: lambda: ema_update_reference(target, online, TAU),
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
        subjects = device_subjects(work, device=place.device, enough_s=size.enough_s)
        title = ways.target_title(target)
        result = measured_part(
            "ema", title, subjects, reference=reference, ceiling=CEILING, unit="update", settings=size, place=place, skipped=skipped
        )
        gigabytes = STREAMS * sum(t.numel() * t.element_size() for t in target) / 1e9
        rates = {row.name: {"GB/s": 1000 * gigabytes / row.ms["wall"].median} for row in result.rows if row.name != CEILING}
        return result.with_extra(rates)


class Lars:
    """Measures one LARS step on the device over the online network with its predictor (ResNet-50: 35.1 M in 169 tensors), gradients given.

    How: float32; all subjects update the same parameters from the same gradients, each with its own momentum buffers. Reference:
    torch-optimizer's LARS if installed, else the rule one tensor at a time. Ceiling: `copy_` of the parameters' bytes. Then ours, as a
    CUDA graph, and followed by the target's update.

        python -m benchmarks.gpu_plan lars

    Why: the rule moves 7 streams where a copy has 2 or 3. Other libraries add temporaries, about 1,300 launches, and `if norm != 0`,
    which makes the host wait for the device twice for each of 57 weights.
    """

    FULL, TINY = FULL, TINY
    OURS = "fastbyol LARS.step"

    @classmethod
    def run(cls, size: Size, *, place: Place) -> CaseResult:
        updates = OnlineUpdates(size.model, device=place.device)
        skipped: dict[str, str] = {}
        work: dict[str, Callable[[], object]] = {
            CEILING: updates.copy(),
            BY_TENSOR: lars_by_tensor(updates.params, lr=LR),
            cls.OURS: updates.optimizer().step,
            "LARS.step, then ema_update": updates.lars_then_target(),
            "LARS.step(target_update=...)": updates.lars_with_target(),
            **those_installed({RIVAL: lambda: updates.optimizer("torch_optimizer_lars").step}, skipped),
        }
        if place.device.type == "cuda":
            lr = torch.full((), LR, device=place.device)  # a Python number would become a constant of the graph
            work |= captures({f"{cls.OURS}, CUDA graph": updates.optimizer(lr=lr).step}, place.device, skipped)
        else:
            skipped["CUDA graph"] = "needs CUDA"
        subjects = device_subjects(work, device=place.device, enough_s=size.enough_s)
        title, reference = ways.lars_title(updates), BY_TENSOR if RIVAL in skipped else RIVAL
        return measured_part(
            "lars", title, subjects, reference=reference, ceiling=CEILING, unit="step", settings=size, place=place, skipped=skipped
        )
