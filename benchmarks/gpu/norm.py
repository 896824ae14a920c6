"""Measures batch norm and ReLU of both views, forward and backward, over some of ResNet-50's shapes, on the device.

How: bf16 activations, channels-last, float32 scale and offset. Reference: torch's nn.BatchNorm2d and in-place ReLU, a view at a time. Ours
takes both views as one batch: eager, and compiled as the product compiles it. Ceiling: five copies of the activations, about what the
smallest number of passes moves; GB/s counts those bytes.

    python -m benchmarks.gpu_plan norm

Why: after the convolutions this is the largest part of a step. Eager, each view's norm and the ReLU are passes of their own; Inductor makes
one pass for the statistics and one for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.gpu import Place
from benchmarks.gpu.subjects import ENOUGH_S, device_subjects, measured_part
from benchmarks.record import CaseResult
from fastbyol.models.norm_relu import norm_relu
from fastbyol.models.view_batchnorm import ViewBatchNorm

REFERENCE, OURS, COMPILED = "nn.BatchNorm2d and ReLU, a view at a time", "fastbyol, both views", "fastbyol, both views, compiled"
CEILING, PASSES = "five copies of the activations", 5


@dataclass(frozen=True)
class Size:
    rounds: int
    batch: int
    shapes: tuple[tuple[int, int], ...] = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))
    """(channels, px) of each layer."""
    backend: str = "inductor"
    enough_s: float = ENOUGH_S


FULL = Size(rounds=6, batch=128)
TINY = Size(rounds=1, batch=2, shapes=((8, 6), (16, 3)), backend="aot_eager", enough_s=0)


def run(size: Size, *, place: Place) -> CaseResult:
    inputs = [_activations(size, channels, px, place.device) for channels, px in size.shapes]
    copies = [(torch.empty_like(x), x.detach()) for x in inputs]
    layers = [ViewBatchNorm(channels, views=2).to(place.device) for channels, _ in size.shapes]
    plain = [nn.BatchNorm2d(channels).to(place.device) for channels, _ in size.shapes]
    halves = [half.requires_grad_() for x in inputs for half in x.detach().chunk(2)]
    compiled = torch.compile(norm_relu, fullgraph=True, dynamic=False, backend=size.backend)
    work = {
        CEILING: lambda: [out.copy_(x) for out, x in copies for _ in range(PASSES)],
        REFERENCE: _forward_backward(norm_relu, [layer for layer in plain for _ in range(2)], halves),
        OURS: _forward_backward(norm_relu, layers, inputs),
        COMPILED: _forward_backward(compiled, layers, inputs),
    }
    subjects = device_subjects(work, device=place.device, enough_s=size.enough_s)
    title = f"batch norm and ReLU of two views, forward and backward, {len(size.shapes)} layers, batch {size.batch} a view"
    result = measured_part("norm", title, subjects, reference=REFERENCE, ceiling=CEILING, unit="pass", settings=size, place=place)
    gigabytes = 2 * PASSES * sum(x.numel() * x.element_size() for x in inputs) / 1e9
    return result.with_extra({row.name: {"GB/s": 1000 * gigabytes / row.ms["wall"].median} for row in result.rows})


def _forward_backward(do: Callable[..., Tensor], layers: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Callable[[], None]:
    def both() -> None:
        for layer, x in zip(layers, inputs, strict=True):
            # The input serves as the output's gradient: some tensor of the same shape and layout.
            torch.autograd.backward(do(layer, x), x.detach())

    return both


def _activations(size: Size, channels: int, px: int, device: torch.device) -> Tensor:
    x = torch.randn(2 * size.batch, channels, px, px, device=device, dtype=torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()
