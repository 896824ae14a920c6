"""Measures forward, loss and backward of a small batch, where the host's kernel launches are the limit: eager, compiled, compiled with
CUDA graphs.

How: ResNet-18 at 224 px, bf16, channels-last, views on the device; gradients are set to None before each call. Reference: eager.
Ceiling: the operations at the rate of a large bf16 matrix product.

    python -m benchmarks.gpu_plan launches

Why: a BYOL step of a ResNet-18 has some 1,500 kernels; if each does less than about 10 us of work, the device waits for the host. A
CUDA graph (torch.compile's mode reduce-overhead) launches them all at once. At the large batches of pre-training it should not
matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu import TINY_MODEL, Place
from benchmarks.gpu.step import CEILING, compute_rates, matrix_product
from benchmarks.gpu.subjects import ENOUGH_S, device_subject, part_result
from benchmarks.record import CaseResult
from benchmarks.timing import measure
from fastbyol.byol import build_byol
from fastbyol.config.schema import ModelConfig
from fastbyol.monitors.compute import flop_per_image

REFERENCE = "bf16, eager"
MODES = {"bf16, compiled": "default", "bf16, compiled, CUDA graphs": "reduce-overhead"}


@dataclass(frozen=True)
class Size:
    """Settings. backend: backend of torch.compile; only inductor has modes."""

    model: ModelConfig
    size_px: int
    batch: int
    rounds: int
    matrix: int = 8192
    backend: str = "inductor"
    enough_s: float = ENOUGH_S


FULL = Size(model=ModelConfig(encoder="resnet18"), size_px=224, batch=16, rounds=9)
TINY = Size(
    model=TINY_MODEL,
    size_px=32,
    batch=4,
    rounds=1,
    matrix=64,
    backend="eager",
    enough_s=0,
)


def run(size: Size, *, place: Place) -> CaseResult:
    work = {REFERENCE: _gradients(size, place.device, compile_mode=None)}
    work |= {name: _gradients(size, place.device, compile_mode=mode) for name, mode in MODES.items()}
    subjects = [device_subject(name, do, device=place.device, units=size.batch, enough_s=size.enough_s) for name, do in work.items()]
    flop = flop_per_image(size.model, size_px=size.size_px)
    subjects.append(matrix_product(size.matrix, flop, place.device))
    timings = measure(subjects, rounds=size.rounds, warmup=2)
    return part_result(
        "launches",
        f"forward and backward, {size.model.encoder}, {size.size_px} px, batch {size.batch}",
        subjects,
        timings,
        reference=REFERENCE,
        ceiling=CEILING,
        settings=size,
        extra=compute_rates(timings, flop, place.device),
        place=place,
    )


def _gradients(size: Size, device: torch.device, *, compile_mode: str | None) -> Callable[[], None]:
    """Returns a function that computes new gradients in a network of its own at each call."""
    byol = build_byol(size.model, num_classes=2).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile_mode:
        mode = {"mode": compile_mode} if size.backend == "inductor" else {}
        byol.compile(dynamic=False, backend=size.backend, **mode)
    shape = (size.batch, 3, size.size_px, size.size_px)
    view1, view2 = (torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2))
    label = torch.zeros(size.batch, dtype=torch.int64, device=device)

    def gradients() -> None:
        byol.zero_grad(set_to_none=True)
        if compile_mode:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output = byol(view1, view2, label)
        (output.loss + output.probe_loss).backward()

    return gradients
