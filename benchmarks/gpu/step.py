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
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.breakdown import COPIED, MEGABYTES
from benchmarks.gpu import TINY_MODEL, Place
from benchmarks.gpu.subjects import ENOUGH_S, device_subject, device_subjects, largest_batch, measured_part
from benchmarks.record import CaseResult
from benchmarks.timing import Subject
from benchmarks.training_step import StepSize, TrainingStep, bytes_moved, forget_times
from fastbyol.byol import build_byol
from fastbyol.config.errors import UserError, is_out_of_memory
from fastbyol.config.schema import ModelConfig, PrecisionConfig, TrainConfig
from fastbyol.config.views import ViewPair
from fastbyol.monitors.compute import flop_per_image, peak_flop_per_s
from fastbyol.tuning.candidates import reason_not_to_compile
from fastbyol.tuning.stepper import release_memory

REFERENCE, OURS, CEILING = "float32, NCHW", "bf16, channels-last", "bf16 matrix product, same operations"
MEMORY = "copy of as many bytes"
SEARCHED = "bf16, channels-last, cudnn.benchmark"
VARIANTS = {
    REFERENCE: PrecisionConfig(autocast="off", channels_last=False, compile="no"),
    "bf16, NCHW": PrecisionConfig(autocast="bf16", channels_last=False, compile="no"),
    OURS: PrecisionConfig(autocast="bf16", channels_last=True, compile="no"),
    SEARCHED: PrecisionConfig(autocast="bf16", channels_last=True, compile="no"),
}
NUM_CLASSES = 1000
STEP_S = 0.5
"""A step takes longer than the work of other parts, and so does a sample of it."""


@dataclass(frozen=True)
class Size:
    model: ModelConfig
    size_px: int
    rounds: int
    batch: int = 0
    """0 means the largest that fits."""
    matrix: int = 8192
    """Side of the ceiling's matrices: large enough that the product, not its launch, takes the time."""
    copy_mib: int = 1024
    enough_s: float = STEP_S


FULL = Size(model=ModelConfig(encoder="resnet50"), size_px=224, rounds=6)
TINY = Size(model=TINY_MODEL, size_px=32, rounds=1, batch=4, matrix=64, copy_mib=1, enough_s=0)


def run(size: Size, *, place: Place) -> CaseResult:
    batch = most_images(size, place.device)
    steps, subjects, skipped = _variants(size, batch, place.device)
    flop = flop_per_image(size.model, size_px=size.size_px)
    megabytes = steps[OURS].megabytes
    subjects += [matrix_product(size.matrix, flop, place.device), copy_subject(size.copy_mib, megabytes, place.device)]
    title = f"one BYOL step, {size.model.encoder}, {size.size_px} px, batch {batch}, {flop / 1e9:.1f} GFLOP an image"
    given = {"settings": size, "place": place, "skipped": skipped, "warmed_up": partial(forget_times, steps.values())}
    result = measured_part("step", title, subjects, reference=REFERENCE, ceiling=CEILING, **given)
    extra = compute_rates(result, flop, place.device)
    for name, step in steps.items():
        # The shares first: counting the bytes takes one more step.
        extra[name] |= step.time_shares() | {MEGABYTES: step.megabytes}
    return result.with_extra({**extra, MEMORY: {COPIED: megabytes / result.row(MEMORY).ms["wall"].median}})


def _variants(size: Size, batch: int, device: torch.device) -> tuple[dict[str, NoiseStep], list[Subject], dict[str, str]]:
    """Returns the variants that fit, as steps and as subjects, and why the others do not; float32 starts at half the batch."""
    steps, subjects, skipped = {}, [], {}
    for name, precision in VARIANTS.items():
        num = max(1, batch // 2) if name == REFERENCE else batch
        while name not in steps and name not in skipped:
            try:
                steps[name] = NoiseStep(size, precision, num, device, search=name == SEARCHED)
                # It calls the step twice, so one that does not fit fails here.
                subjects.append(device_subject(name, steps[name], device=device, units=num, enough_s=size.enough_s, note=f"batch {num}"))
            except RuntimeError as error:
                steps.pop(name, None)
                if not is_out_of_memory(error) or name == OURS or num <= 2:
                    raise
                if name != REFERENCE:
                    skipped[name] = f"out of memory at batch {num}"
                num //= 2
            release_memory()  # only here: inside `except`, the traceback's frames still hold the memory
    return steps, subjects, skipped


class NoiseStep(TrainingStep):
    """Callable that takes one optimizer step on a batch of noise on the device. search: cuDNN tries its algorithms once for each shape."""

    def __init__(self, size: Size, precision: PrecisionConfig, batch: int, device: torch.device, *, search: bool = False) -> None:
        views = ViewPair(size_px=size.size_px)
        config = TrainConfig(global_batch=batch, model=size.model, precision=precision, views=views)
        super().__init__(config, num_classes=NUM_CLASSES, device=device)
        self._search = search

    def __call__(self) -> None:
        # A global switch of torch, so it is set around each call and not left on for the other subjects.
        torch.backends.cudnn.benchmark = self._search
        self.run_on_noise()
        torch.backends.cudnn.benchmark = False

    @functools.cached_property
    def megabytes(self) -> float:
        """Megabytes that a step moves per image if no cache helps."""
        return bytes_moved(self) / self.config.global_batch / 1e6


def most_images(size: Size, device: torch.device) -> int:
    """Returns the batch of the settings, or the largest whose step fits."""

    def two_steps(batch: int) -> None:
        step = NoiseStep(size, VARIANTS[OURS], batch, device)
        step()  # creates the momentum buffers, which the next one needs beside the activations
        step()

    return size.batch or largest_batch(two_steps, device)


def compute_rates(
    result: CaseResult, flop: float, device: torch.device, *, uses_16_bits: Collection[str] | None = None
) -> dict[str, dict[str, float]]:
    """Returns TFLOP/s by row, and the share of the GPU's 16-bit peak if it is known and the row uses 16 bits (None: by its name)."""
    peak = peak_flop_per_s(torch.cuda.get_device_name(device), autocast="bf16") if device.type == "cuda" else None
    rates: dict[str, dict[str, float]] = {}
    for row in result.rows:
        if row.role == "memory ceiling":
            continue  # a copy does no operations
        achieved = 1000 * flop / row.ms["wall"].median
        in_16_bits = "bf16" in row.name if uses_16_bits is None else row.name in uses_16_bits
        # A float32 row has another peak, so a share of the 16-bit one would say nothing.
        rates[row.name] = {"TFLOP/s": achieved / 1e12} | ({"mfu": achieved / peak} if peak and in_16_bits else {})
    return rates


def copy_subject(mebibytes: int, megabytes_per_image: float, device: torch.device) -> Subject:
    """Returns a copy on the device as a subject, counted in images that move as many bytes; both reads and writes count."""
    source = torch.zeros(mebibytes << 20, dtype=torch.uint8, device=device)
    out = torch.empty_like(source)
    units = 2 * len(source) / (1e6 * megabytes_per_image)
    return device_subject(MEMORY, lambda: out.copy_(source), device=device, units=units, role="memory ceiling")


def matrix_product(side: int, flop: float, device: torch.device) -> Subject:
    """Returns a square bf16 matrix product as a subject, counted in images whose step has as many operations."""
    # Written into `out`: an allocation per call would be the allocator's time, not the product's.
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
        batch, flop = most_images(size, device), flop_per_image(size.model, size_px=size.size_px)
        variants = {OURS: eager, f"{OURS}, compiled": replace(eager, compile="yes")}
        work = {name: NoiseStep(size, precision, batch, device) for name, precision in variants.items()}
        subjects = device_subjects(work, device=device, units=batch, enough_s=size.enough_s)
        subjects.append(matrix_product(size.matrix, flop, device))
        title = f"one BYOL step, {size.model.encoder}, {size.size_px} px, batch {batch}"
        result = measured_part("step_compiled", title, subjects, reference=OURS, ceiling=CEILING, settings=size, place=place)
        return result.with_extra(compute_rates(result, flop, device))


@dataclass(frozen=True)
class LaunchSize(StepSize):
    matrix: int = 8192
    backend: str = "inductor"
    """Backend of torch.compile; only inductor has modes."""
    enough_s: float = ENOUGH_S


MODES = {"bf16, eager": None, "bf16, compiled": "default", "bf16, compiled, CUDA graphs": "reduce-overhead"}


class Launches:
    """Measures forward, loss and backward of a small batch, where the host's kernel launches are the limit: eager, compiled, compiled with
    CUDA graphs.

    How: ResNet-18 at 224 px, bf16, channels-last, views on the device; gradients are set to None before each call. Reference: eager.
    Ceiling: the operations at the rate of a large bf16 matrix product.

        python -m benchmarks.gpu_plan launches

    Why: a BYOL step of a ResNet-18 has some 1,500 kernels; if each does less than about 10 us of work, the device waits for the host. A
    CUDA graph (torch.compile's mode reduce-overhead) launches them all at once. At the large batches of pre-training it should not
    matter.
    """

    FULL = LaunchSize(model=ModelConfig(encoder="resnet18"), size_px=224, batch=16, rounds=9)
    TINY = LaunchSize(model=TINY_MODEL, size_px=32, batch=4, rounds=1, matrix=64, backend="eager", enough_s=0)

    @staticmethod
    def run(size: LaunchSize, *, place: Place) -> CaseResult:
        work = {name: _gradients(size, place.device, compile_mode=mode) for name, mode in MODES.items()}
        subjects = device_subjects(work, device=place.device, units=size.batch, enough_s=size.enough_s)
        flop = flop_per_image(size.model, size_px=size.size_px)
        subjects.append(matrix_product(size.matrix, flop, place.device))
        title = f"forward and backward, {size.model.encoder}, {size.size_px} px, batch {size.batch}"
        # Two: a CUDA graph is recorded in a function's second call, after one that runs it as usual.
        result = measured_part("launches", title, subjects, reference="bf16, eager", ceiling=CEILING, settings=size, warmup=2, place=place)
        return result.with_extra(compute_rates(result, flop, place.device))


def _gradients(size: LaunchSize, device: torch.device, *, compile_mode: str | None) -> Callable[[], None]:
    """Returns a function that computes new gradients in a network of its own at each call."""
    byol = build_byol(size.model, num_classes=2).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile_mode:
        mode = {"mode": compile_mode} if size.backend == "inductor" else {}
        byol.compile(dynamic=False, backend=size.backend, **mode)
    shape = (size.batch, 3, size.size_px, size.size_px)
    view1, view2 = (torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2))
    label = torch.zeros(size.batch, dtype=torch.int64, device=device)

    def gradients() -> None:
        byol.zero_grad(set_to_none=True)  # an accumulation into existing gradients would add kernels that a step does not have
        if compile_mode:
            # Without the mark, torch keeps the last call's outputs alive in the graph's memory and may refuse to overwrite them.
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output = byol(view1, view2, label)
        (output.loss + output.probe_loss).backward()

    return gradients
