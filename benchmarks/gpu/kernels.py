"""Measures where the device's time of an eager step goes, by kind of operation, and the bandwidth that each kind reaches.

How: the product's step on noise, bf16, channels-last; times of one step from torch's profiler, bytes of the same step counted from the
operands and results of torch's operations (`training_step.py`). GB/s is one over the other.

    python -m benchmarks.gpu_plan kernels

Why: a ResNet's step is bound by memory. A kind of operation far below the card's bandwidth is where something is wrong: a layout that is
reordered, a copy that was not needed, launches that the device waits for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import TINY_MODEL, Findings, Place
from benchmarks.training_step import StepSize, TrainingStep, bytes_by_operation
from fastbyol.config.schema import ModelConfig, PrecisionConfig
from fastbyol.tuning.stepper import synchronize

KINDS = {
    "convolution": ("conv",),
    "batch norm": ("batch_norm", "norm_relu"),
    "matrix product": ("mm", "linear"),
    "pooling": ("pool",),
    "optimizer and target": ("_foreach", "_fused", "lerp"),
    "messages": ("c10d", "nccl", "gloo", "all_reduce", "all_gather"),
    "copies and casts": ("copy", "cat", "clone", "fill", "zero"),
    "ReLU, sums and the rest": ("",),
}
"""Parts of an operation's name, by kind; the first kind that fits."""


@dataclass(frozen=True)
class Size(StepSize):
    pass


FULL = Size(model=ModelConfig(encoder="resnet50"), size_px=224, batch=256, rounds=1)
TINY = Size(model=TINY_MODEL, size_px=32, batch=4, rounds=1)


def run(size: Size, *, place: Place) -> Findings:
    config = size.config(precision=PrecisionConfig(compile="no"))
    step = TrainingStep(config, num_classes=10, device=place.device)
    step.run_on_noise(2)  # kernels are loaded and buffers made
    synchronize(place.device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if place.device.type == "cuda" else [])
    with profile(activities=activities) as profiled:
        step.run_on_noise()
        synchronize(place.device)
    times = times_by_kind(profiled.key_averages(), on_gpu=place.device.type == "cuda")
    moved = by_kind(bytes_by_operation(step.run_on_noise))
    return Findings("kernels", f"time of an eager step by kind, {size.model.encoder}, batch {size.batch}", table(times, moved))


def kind_of(operation: str) -> str:
    """Returns the kind of an operation, named as 'aten::cudnn_convolution' or 'fastbyol::norm_relu'."""
    return next(kind for kind, parts in KINDS.items() if any(part in operation for part in parts))


def by_kind(by_operation: Counter[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for operation, value in by_operation.items():
        found[kind_of(operation)] += value
    return found


def times_by_kind(events: Any, *, on_gpu: bool) -> Counter[str]:
    """Returns milliseconds by kind, of operations themselves and not of those that they call: 'aten::' ones and our own."""
    found: Counter[str] = Counter()
    for event in events:
        # A kernel's time stands at its operation, and again at an event of the kernel itself, whose C++ name has a '::' too.
        if "::" in event.key and event.device_type == DeviceType.CPU and not event.is_user_annotation:
            found[event.key] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000
    return by_kind(found)


def table(ms: Counter[str], num_bytes: Counter[str]) -> dict[str, str]:
    """Returns a line for each kind that takes time, the longest first."""
    total = sum(ms.values()) or 1.0
    lines = {}
    for kind, value in ms.most_common():
        if value > 0:
            gigabytes = num_bytes[kind] / 1e9
            lines[kind] = f"{value:.2f} ms, {value / total:.0%} of the step; {gigabytes:.2f} GB, {1000 * gigabytes / value:.0f} GB/s"
    return lines
