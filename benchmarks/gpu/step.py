"""Measures a whole BYOL step on the device, views given, at the largest batch that fits: images/s per GPU, and MFU.

How: the product's `train_step` on noise, eager. The largest batch is predicted from the memory of two small ones. Reference: float32,
NCHW, at half that batch, or less if that does not fit. bf16 is also measured in NCHW, and with cuDNN's search for algorithms, which
the product leaves off. Ceiling: the step's operations, counted by torch, at the rate of a large bf16 matrix product in the same
rounds; for memory, a copy of the bytes that our step's operations read and write (`training_step.py`).
MFU: those operations over the GPU's peak from its data sheet (`fastbyol/monitors/compute.py`), if the GPU is known. The shares of
forward and backward and of the update come from the monitor, which uses CUDA events.

    python -m benchmarks.gpu_plan step

Why: a ResNet's batch norm, ReLU and residual sums are memory passes, and moving their bytes takes longer than the convolutions'
operations: see docs/performance.md for the limit by memory, several times below the ceiling here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch

from benchmarks.breakdown import COPIED, MEGABYTES
from benchmarks.gpu import TINY_MODEL, Place
from benchmarks.gpu.subjects import device_subject, largest_batch, part_result
from benchmarks.record import CaseResult
from benchmarks.timing import Subject, Timings, measure
from benchmarks.training_step import TrainingStep, bytes_moved, synthetic_batch
from fastbyol.config.errors import UserError
from fastbyol.config.schema import ModelConfig, PrecisionConfig, TrainConfig
from fastbyol.monitors.compute import flop_per_image, peak_flop_per_s
from fastbyol.tuning.candidates import reason_not_to_compile
from fastbyol.tuning.stepper import is_out_of_memory, release_memory

REFERENCE, OURS, CEILING = "float32, NCHW", "bf16, channels-last", "bf16 matrix product, same operations"
MEMORY = "copy of as many bytes"
SEARCHED = "bf16, channels-last, cudnn.benchmark"
VARIANTS = {
    REFERENCE: PrecisionConfig(autocast="off", channels_last=False),
    "bf16, NCHW": PrecisionConfig(autocast="bf16", channels_last=False),
    OURS: PrecisionConfig(autocast="bf16", channels_last=True),
    SEARCHED: PrecisionConfig(autocast="bf16", channels_last=True),
}
NUM_CLASSES = 1000
ENOUGH_S = 0.5


@dataclass(frozen=True)
class Size:
    """Settings. batch: 0 means the largest that fits. matrix: side of the ceiling's matrices."""

    model: ModelConfig
    size_px: int
    rounds: int
    batch: int = 0
    matrix: int = 8192
    copy_mib: int = 1024
    enough_s: float = ENOUGH_S


FULL = Size(model=ModelConfig(encoder="resnet50"), size_px=224, rounds=6)
TINY = Size(
    model=TINY_MODEL,
    size_px=32,
    rounds=1,
    batch=4,
    matrix=64,
    copy_mib=1,
    enough_s=0,
)


def run(size: Size, *, place: Place) -> CaseResult:
    batch = size.batch or largest_batch(lambda n: one_step(size, VARIANTS[OURS], n, place.device), place.device)
    steps, subjects, skipped = _variants(size, batch, place.device)
    flop = flop_per_image(size.model, size_px=size.size_px)
    megabytes = steps[OURS].megabytes
    subjects += [matrix_product(size.matrix, flop, place.device), copy_subject(size.copy_mib, megabytes, place.device)]
    timings = measure(subjects, rounds=size.rounds, warmed_up=lambda: [step.forget_times() for step in steps.values()])
    rates = compute_rates({name: timing for name, timing in timings.items() if name != MEMORY}, flop, place.device)
    extra = {name: rates[name] | (steps[name].figures() if name in steps else {}) for name in rates}
    extra[MEMORY] = {COPIED: megabytes / median(timings[MEMORY].ms["wall"])}
    title = f"one BYOL step, {size.model.encoder}, {size.size_px} px, batch {batch}, {flop / 1e9:.1f} GFLOP an image"
    return part_result(
        "step", title, subjects, timings, reference=REFERENCE, ceiling=CEILING, settings=size, extra=extra, skipped=skipped, place=place
    )


def _variants(size: Size, batch: int, device: torch.device) -> tuple[dict[str, NoiseStep], list[Subject], dict[str, str]]:
    """Returns the variants that fit, as steps and as subjects, and those that do not. float32 gets half the batch, halved again until it
    fits.
    """
    steps, subjects, skipped = {}, [], {}
    for name, precision in VARIANTS.items():
        num = max(1, batch // 2) if name == REFERENCE else batch
        while name not in steps and name not in skipped:
            try:
                steps[name], subject = _variant(name, size, precision, num, device)
                subjects.append(subject)
            except RuntimeError as error:
                if not is_out_of_memory(error) or name == OURS or num <= 2:
                    raise
                if name != REFERENCE:
                    skipped[name] = f"out of memory at batch {num}"
                num //= 2
            release_memory()  # only here: inside `except`, the traceback's frames still hold the memory
    return steps, subjects, skipped


def _variant(name: str, size: Size, precision: PrecisionConfig, batch: int, device: torch.device) -> tuple[NoiseStep, Subject]:
    step = NoiseStep(size, precision, batch, device, search=name == SEARCHED)
    return step, device_subject(name, step, device=device, units=batch, enough_s=size.enough_s, note=f"batch {batch}")


class NoiseStep:
    """Callable that takes one optimizer step on a batch of noise on the device. search: cuDNN tries its algorithms once for each shape."""

    def __init__(self, size: Size, precision: PrecisionConfig, batch: int, device: torch.device, *, search: bool = False) -> None:
        config = TrainConfig(global_batch=batch, model=size.model, precision=precision)
        self._step = TrainingStep(config, num_classes=NUM_CLASSES, device=device)
        self._views = synthetic_batch(
            num=batch, size_px=size.size_px, num_classes=NUM_CLASSES, channels_last=precision.channels_last, device=device
        )
        self._search = search

    def __call__(self) -> None:
        # A global switch of torch, so it is set around each call and not left on for the other subjects.
        torch.backends.cudnn.benchmark = self._search
        self._step.run([self._views])
        torch.backends.cudnn.benchmark = False

    def forget_times(self) -> None:
        self._step.forget_times()

    @functools.cached_property
    def megabytes(self) -> float:
        """Megabytes that a step moves per image if no cache helps."""
        return bytes_moved(self) / len(self._views.index) / 1e6

    def figures(self) -> dict[str, float]:
        """Returns bytes per image and shares of time; the shares are read first, because counting the bytes takes one more step."""
        return self._step.time_shares() | {MEGABYTES: self.megabytes}


def one_step(size: Size, precision: PrecisionConfig, batch: int, device: torch.device) -> None:
    """Takes two steps, to measure their memory: the momentum buffers are created in the first."""
    step = NoiseStep(size, precision, batch, device)
    step()
    step()


def compute_rates(
    timings: dict[str, Timings], flop: float, device: torch.device, *, uses_16_bits: Callable[[str], bool] = lambda name: "bf16" in name
) -> dict[str, dict[str, float]]:
    """Returns TFLOP/s of each subject, and its share of the GPU's 16-bit peak if the GPU is known and the subject uses 16 bits."""
    peak = peak_flop_per_s(torch.cuda.get_device_name(device), autocast="bf16") if device.type == "cuda" else None
    rates: dict[str, dict[str, float]] = {}
    for name, timing in timings.items():
        achieved = 1000 * flop / median(timing.ms["wall"])
        rates[name] = {"TFLOP/s": achieved / 1e12} | ({"mfu": achieved / peak} if peak and uses_16_bits(name) else {})
    return rates


def copy_subject(mebibytes: int, megabytes_per_image: float, device: torch.device) -> Subject:
    """Returns a copy on the device as a subject, counted in images that move as many bytes; both reads and writes count."""
    source = torch.zeros(mebibytes << 20, dtype=torch.uint8, device=device)
    out = torch.empty_like(source)
    units = 2 * len(source) / (1e6 * megabytes_per_image)
    return device_subject(MEMORY, lambda: out.copy_(source), device=device, units=units, role="memory ceiling")


def matrix_product(side: int, flop: float, device: torch.device) -> Subject:
    """Returns a square bf16 matrix product as a subject, counted in images whose step has as many operations."""
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return device_subject(CEILING, lambda: torch.mm(a, b, out=out), device=device, units=2 * side**3 / flop)


class Compiled:
    """Measures the step of the part `step` compiled (precision.compile) and eager, bf16 channels-last, at the same batch.

    How: as in `step`; the batch is the largest that fits eagerly. Reference: eager. Ceiling: the matrix product's rate.

        python -m benchmarks.gpu_plan step_compiled

    Why: Inductor fuses batch norm's second pass with the ReLU and the residual sum around it: 1.3 to 1.5 x fewer bytes according to
    docs/performance.md. Compiling takes a minute or more, which is not timed.
    """

    FULL, TINY = FULL, TINY

    @staticmethod
    def run(size: Size, *, place: Place) -> CaseResult:
        eager, device = VARIANTS[OURS], place.device
        if reason := reason_not_to_compile(device, seconds=math.inf):
            raise UserError(reason)  # the product itself would fall back to eager mode
        batch = size.batch or largest_batch(lambda n: one_step(size, eager, n, device), device)
        variants = {OURS: eager, f"{OURS}, compiled": replace(eager, compile=True)}
        flop = flop_per_image(size.model, size_px=size.size_px)
        subjects = [
            device_subject(name, NoiseStep(size, precision, batch, device), device=device, units=batch, enough_s=size.enough_s)
            for name, precision in variants.items()
        ]
        subjects.append(matrix_product(size.matrix, flop, device))
        timings = measure(subjects, rounds=size.rounds)
        return part_result(
            "step_compiled",
            f"one BYOL step, {size.model.encoder}, {size.size_px} px, batch {batch}",
            subjects,
            timings,
            reference=OURS,
            ceiling=CEILING,
            settings=size,
            extra=compute_rates(timings, flop, device),
            place=place,
        )
