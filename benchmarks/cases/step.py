"""What: a whole optimizer step of BYOL on the CPU, views given: four forwards, backward, LARS, the target's update.

How: the product's `train_step` on noise, one thread. Reference: float32, NCHW. Then channels-last, then bf16 autocast with it (the
product's default). Ceiling: the step's floating-point operations, counted by torch, at the rate of a single bf16 channels-last 3x3
convolution measured in the same rounds.

    python -m benchmarks.run step

Why: channels-last spares oneDNN the reordering of activations; bf16 halves the bytes and uses the CPU's bf16 instructions where it has
them. Batch norm, ReLU and the residual sums run no faster than memory, and small images leave little work in each call: the gap to the
convolution's rate. It says nothing about a GPU, where memory bounds the step (not measured yet).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import CaseResult, make_result
from benchmarks.timing import Subject, measure, torch_threads
from benchmarks.training_step import TrainingStep, synthetic_batch
from fastbyol.config.schema import ModelConfig, PrecisionConfig, TrainConfig

REFERENCE, CEILING = "float32, NCHW", "bf16 3x3 convolution, same operations"
VARIANTS = {
    REFERENCE: PrecisionConfig(autocast="off", channels_last=False),
    "float32, channels-last": PrecisionConfig(autocast="off", channels_last=True),
    "bf16, channels-last": PrecisionConfig(autocast="bf16", channels_last=True),
}
NUM_CLASSES = 10
CONV_BATCH, CONV_CHANNELS, CONV_PX, CONV_CALLS = 16, 512, 7, 8
"""Of eight shapes tried from 64 channels at 56 px to these, the one with the highest rate; they differ by 10 %."""


@dataclass(frozen=True)
class Size:
    model: ModelConfig
    size_px: int
    batch: int
    rounds: int
    threads: int = 1


QUICK = Size(model=ModelConfig(encoder="resnet18"), size_px=64, batch=16, rounds=6)
FULL = Size(model=ModelConfig(encoder="resnet50"), size_px=224, batch=4, rounds=9)


def run(size: Size, *, scratch: Path) -> CaseResult:
    del scratch  # nothing is written
    with torch_threads(size.threads):
        steps = {name: _make_step(size, precision) for name, precision in VARIANTS.items()}
        flop_per_image = _count_flop(steps[REFERENCE]) / size.batch
        subjects = [Subject(name, step, units=size.batch) for name, step in steps.items()]
        subjects.append(_convolution(flop_per_image))
        timings = measure(subjects, rounds=size.rounds)
    model = f"{size.model.encoder}, {size.size_px} px, batch {size.batch}"
    return make_result(
        "step",
        f"one BYOL step, {model}, {flop_per_image / 1e9:.1f} GFLOP an image",
        subjects,
        timings,
        reference=REFERENCE,
        ceiling=CEILING,
        unit="image",
        threads=size.threads,
        settings=size,
        extra={name: {"GFLOP/CPU-s": flop_per_image / median(timing.ms["cpu"]) / 1e6} for name, timing in timings.items()},
    )


def _make_step(size: Size, precision: PrecisionConfig) -> Callable[[], None]:
    config = TrainConfig(global_batch=size.batch, model=size.model, precision=precision)
    step = TrainingStep(config, num_classes=NUM_CLASSES)
    batch = synthetic_batch(num=size.batch, size_px=size.size_px, num_classes=NUM_CLASSES, channels_last=precision.channels_last)
    return lambda: step.run([batch])


def _count_flop(step: Callable[[], None]) -> int:
    """Of convolutions and matrix products, two for each multiply-add."""
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return counter.get_total_flops()


def _convolution(flop_per_image: float) -> Subject:
    x = torch.randn(CONV_BATCH, CONV_CHANNELS, CONV_PX, CONV_PX, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(CONV_CHANNELS, CONV_CHANNELS, 3, 3, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    flop = 2 * 9 * CONV_CHANNELS**2 * CONV_PX**2 * CONV_BATCH
    run = torch.no_grad()(lambda: F.conv2d(x, weight, padding=1))
    return Subject(CEILING, run, units=flop / flop_per_image, calls=CONV_CALLS)
