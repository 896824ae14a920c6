"""What: a whole BYOL step on the device, views given, at the largest batch that fits: images/s per GPU, and MFU.

How: the product's `train_step` on noise, eager. The largest batch is found from the memory of two small ones. Reference: float32, NCHW, at half
that batch, which is what fits. Ceiling: the step's operations, counted by torch, at the rate of a large bf16 matrix product in the same rounds.
MFU: those operations over the card's peak by its data sheet (`fastbyol/monitors/compute.py`), where the card is known. The shares of forward and
backward and of the update are the monitor's, by CUDA events.

    python -m benchmarks.gpu_plan step

Why: a ResNet's batch norm, ReLU and residual sums are memory passes, and their bytes take longer than the convolutions' operations: see
docs/performance.md for the limit by memory, several times below the ceiling here.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch

from benchmarks.gpu import Place
from benchmarks.gpu.memory import largest_batch
from benchmarks.gpu.subjects import device_subject
from benchmarks.record import CaseResult, make_result
from benchmarks.timing import Subject, Timings, measure
from benchmarks.training_step import TrainingStep, synthetic_batch
from fastbyol.config.schema import ModelConfig, PrecisionConfig, TrainConfig
from fastbyol.data.batch import ViewBatch
from fastbyol.monitors.compute import flop_per_image, peak_flop_per_s

REFERENCE, OURS, CEILING = "float32, NCHW", "bf16, channels-last", "bf16 matrix product, same operations"
VARIANTS = {
    REFERENCE: PrecisionConfig(autocast="off", channels_last=False),
    "bf16, NCHW": PrecisionConfig(autocast="bf16", channels_last=False),
    OURS: PrecisionConfig(autocast="bf16", channels_last=True),
}
NUM_CLASSES = 1000


@dataclass(frozen=True)
class Size:
    """batch: 0 takes the largest that fits. matrix: side of the ceiling's matrices."""

    model: ModelConfig
    size_px: int
    rounds: int
    batch: int = 0
    matrix: int = 8192


FULL = Size(model=ModelConfig(encoder="resnet50"), size_px=224, rounds=6)
TINY = Size(model=ModelConfig(encoder="resnet8", stem="small2", hidden_dim=16, projection_dim=8), size_px=32, rounds=1, batch=4, matrix=64)


def run(size: Size, *, place: Place) -> CaseResult:
    batch = size.batch or largest_batch(lambda n: one_step(size, VARIANTS[OURS], n, place.device), place.device)
    batches = {name: max(1, batch // 2) if name == REFERENCE else batch for name in VARIANTS}
    steps, subjects, skipped = _variants(size, batches, place.device)
    flop = flop_per_image(size.model, size_px=size.size_px)
    subjects.append(matrix_product(size.matrix, flop, place.device))
    timings = measure(subjects, rounds=size.rounds, warmed_up=lambda: [step.forget_times() for step in steps.values()])
    rates = compute_rates(timings, flop, place.device)
    return make_result(
        "gpu.step",
        f"one BYOL step, {size.model.encoder}, {size.size_px} px, batch {batch}, {flop / 1e9:.1f} GFLOP an image",
        subjects,
        timings,
        reference=REFERENCE,
        ceiling=CEILING,
        unit="image",
        threads=torch.get_num_threads(),
        primary="wall",
        settings=size,
        extra={name: rates[name] | (steps[name].time_shares() if name in steps else {}) for name in rates},
        skipped=skipped,
        device=place.device.type,
    )


def _variants(size: Size, batches: dict[str, int], device: torch.device) -> tuple[dict[str, NoiseStep], list[Subject], dict[str, str]]:
    """What fits of the variants, as steps and as subjects, and what does not."""
    steps, subjects, skipped = {}, [], {}
    for name, precision in VARIANTS.items():
        note = f"batch {batches[name]}"
        try:
            step = NoiseStep(size, precision, batches[name], device)
            subjects.append(device_subject(name, step, device=device, units=batches[name], enough_s=0, note=note))
            steps[name] = step
        except torch.cuda.OutOfMemoryError:
            if name in (REFERENCE, OURS):
                raise
            skipped[name] = f"out of memory at {note}"
    return steps, subjects, skipped


class NoiseStep:
    """A call is one optimizer step on a batch of noise that lies on the device."""

    def __init__(self, size: Size, precision: PrecisionConfig, batch: int, device: torch.device) -> None:
        config = TrainConfig(global_batch=batch, model=size.model, precision=precision)
        self._step = TrainingStep(config, num_classes=NUM_CLASSES, device=device)
        noise = synthetic_batch(num=batch, size_px=size.size_px, num_classes=NUM_CLASSES, channels_last=precision.channels_last)
        self._views = ViewBatch(*(tensor.to(device) for tensor in noise))

    def __call__(self) -> None:
        self._step.run([self._views])

    def forget_times(self) -> None:
        self._step.forget_times()

    def time_shares(self) -> dict[str, float]:
        return self._step.time_shares()


def one_step(size: Size, precision: PrecisionConfig, batch: int, device: torch.device) -> None:
    """Two steps and their memory: the momenta are made in the first."""
    step = NoiseStep(size, precision, batch, device)
    step()
    step()


def compute_rates(timings: dict[str, Timings], flop: float, device: torch.device) -> dict[str, dict[str, float]]:
    """TFLOP/s of each subject, and the share of the card's 16-bit peak where the card is known and the subject uses it."""
    peak = peak_flop_per_s(torch.cuda.get_device_name(device), autocast="bf16") if device.type == "cuda" else None
    rates: dict[str, dict[str, float]] = {}
    for name, timing in timings.items():
        achieved = 1000 * flop / median(timing.ms["wall"])
        rates[name] = {"TFLOP/s": achieved / 1e12} | ({"mfu": achieved / peak} if peak and name.startswith("bf16") else {})
    return rates


def matrix_product(side: int, flop: float, device: torch.device) -> Subject:
    """A square bf16 product, counted in images of a step of so many operations."""
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return device_subject(CEILING, lambda: torch.mm(a, b, out=out), device=device, units=2 * side**3 / flop)
