"""Measures a whole optimizer step of BYOL on the CPU, views given: both views through both networks, backward, LARS, the target's update.

How: the product's `train_step` on noise, one thread; ResNet-50 at 224 px, batch 16. Reference: the step as in most libraries
(`PlainStep`): float32, NCHW, eager, a forward for each view with torch's batch norm, torch-optimizer's LARS, solo-learn's
loop over the target. Rivals: solo-learn's module and lightly's blocks at their best (`rival_steps.py`): bf16 autocast, channels-last, the
target by foreach. On a CPU without instructions for bf16 its autocast computes in float32, ours and the rivals', and the rows are named so.
Each of the three is in a process of its own, because the product's step changes how memory is managed. Ours in float32 and in bf16 (the
product's default), both channels-last; bf16 in NCHW; bf16 in two micro-batches of half the size (rank_batch); bf16 compiled (not with
--quick). fp16 needs a GPU. MiB: the peak of resident memory after three steps in a process of its own, libraries included (with --quick, of
our bf16 step and the others only); the last of our rows returns freed memory to the system (precision.freed_memory). Ceiling: the step's
floating-point operations, counted by torch, at the rate of a single channels-last 3x3 convolution in the same format measured in the same
rounds; 'of peak' is the share of that rate. A second ceiling, for memory: a copy of 64 MiB, converted to images by the bytes of our bf16
step. MB: bytes of all operands and results of torch's operations and our norm's (`training_step.py`), which is what moves if no cache
helps; the fused update's kernel and code compiled by Inductor are not included.

    python -m benchmarks.run step

Why: channels-last saves oneDNN the reordering of activations; bf16 halves the bytes and uses the CPU's bf16 instructions if it has
them; both views in one batch halve the casts and reorderings of weights and give each convolution twice the work (1.08 x). Norm, sum
and ReLU are one operation (`models/norm_relu.py`), which takes two thirds of the time of torch's separate ones. The process keeps the
memory that a step frees (`run/precision.py`): if it were returned and allocated again, every activation would be mapped and zeroed
anew, a fifth of the reference's time (with our setting the reference would take 2.35 x our time, not 2.9 x). Convolutions are more
than four fifths of the rest and run at 70 to 95 % of the ceiling's rate.
torch.compile gains nothing here (the last row): on a CPU Inductor's batch norm is slower than torch's own and than ours. The batch
size matters to the reference: below 16 images, torch runs 1x1 convolutions on one thread with MKL, which is faster than what it uses
from 16 on; at batch 4 the ratio is therefore smaller. This says nothing about a GPU, where memory limits the step (not measured yet).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.breakdown import COPIED, MEGABYTES, OF_PEAK
from benchmarks.own_process import PEAK, in_own_process, peak_mib_of
from benchmarks.record import CaseResult, measured
from benchmarks.rival_steps import STEPS
from benchmarks.rivals import those_installed
from benchmarks.timing import Subject, subjects_of, torch_threads
from benchmarks.training_step import DTYPE, FORMAT, StepSize, TrainingStep, bytes_moved, forget_times, noise_batch
from benchmarks.updates import CPU, solo_learn_update
from fastbyol.byol import build_byol
from fastbyol.config.errors import UserError
from fastbyol.config.schema import ModelConfig, OptimConfig, PrecisionConfig, TrainConfig
from fastbyol.data.batch import ViewBatch
from fastbyol.models.view_batchnorm import convert_to_batchnorm
from fastbyol.objectives import byol_loss
from fastbyol.optim.build import build_optimizer
from fastbyol.tuning.candidates import reason_not_to_compile
from fastbyol.tuning.stepper import LR, TAU

REFERENCE, CEILING = "plain: float32, NCHW, a view at a time", f"{FORMAT} 3x3 convolution, same operations"
OURS, ACCUMULATED, COMPILED = f"{FORMAT}, channels-last", f"{FORMAT}, channels-last, 2 micro-batches", f"{FORMAT}, channels-last, compiled"
RETURNING = f"{FORMAT}, channels-last, freed memory returned"
"""Ours, in a process of its own as the rivals are, with precision.freed_memory return."""
VARIANTS = {
    "float32, channels-last": PrecisionConfig(autocast="off", channels_last=True),
    OURS: PrecisionConfig(autocast="bf16", channels_last=True),
    f"{FORMAT}, NCHW": PrecisionConfig(autocast="bf16", channels_last=False),
    "fp16, channels-last": PrecisionConfig(autocast="fp16", channels_last=True),
}
NUM_CLASSES = 10
MEMORY, COPY_BYTES = "copy of as many bytes", 64 << 20
CONV_BATCH, CONV_CHANNELS, CONV_PX, CONV_CALLS = 16, 512, 7, 8
"""Shape of the ceiling's convolution: the fastest of eight tried, from 64 channels at 56 px to this one; their rates differ by 10 %."""


@dataclass(frozen=True)
class Size(StepSize):
    threads: int = 1
    compile: bool = True
    every_peak: bool = True
    """Measure the memory of all our variants, each in one more process; False: of our bf16 step only."""


QUICK = Size(model=ModelConfig(encoder="resnet18"), size_px=64, batch=8, rounds=6, compile=False, every_peak=False)
FULL = Size(model=ModelConfig(encoder="resnet50"), size_px=224, batch=16, rounds=6)


def run(size: Size, *, scratch: Path, case: str = "step") -> CaseResult:
    skipped: dict[str, str] = {}
    with torch_threads(size.threads), ExitStack() as opened:
        # Counted here and not in their own processes, where torch's dispatch cannot be watched; compiled code has no operations to see.
        others = those_installed({name: partial(_other_step, size, name) for name in (REFERENCE, *STEPS)}, skipped)
        mb = {name: bytes_moved(others.pop(name)) / size.batch / 1e6 for name in list(others)}
        apart = {name: opened.enter_context(in_own_process(_other_step, size, name)) for name in mb}
        apart[RETURNING] = opened.enter_context(in_own_process(_own_step, size, RETURNING))
        ours = those_installed(_variants(size), skipped)
        flop_per_image = _count_flop(ours[OURS].run_on_noise) / size.batch
        work = {name: step.run_on_noise for name, step in ours.items()}
        mb |= {name: bytes_moved(run) / size.batch / 1e6 for name, run in work.items() if name != COMPILED}
        subjects = subjects_of({**apart, **work}, units=size.batch, rivals=STEPS)
        subjects += [_convolution(flop_per_image), _copy(mb[OURS])]
        title = f"one BYOL step, {size.model.encoder}, {size.size_px} px, batch {size.batch}, {flop_per_image / 1e9:.1f} GFLOP an image"
        given = {"settings": size, "threads": size.threads, "skipped": skipped, "warmed_up": partial(forget_times, ours.values())}
        result = measured(case, title, subjects, reference=REFERENCE, ceiling=CEILING, **given)
        peaks = {name: process.peak_mib() for name, process in apart.items()}
    # After the rounds: while they last, the memory of all of them is in use.
    peaks |= {name: peak_mib_of(_own_step, size, name) for name in (ours if size.every_peak else [OURS])}
    extra: dict[str, dict[str, float]] = {MEMORY: {COPIED: mb[OURS] / result.row(MEMORY).ms["cpu"].median}}
    for row in result.rows:
        if row.name != MEMORY:
            extra[row.name] = {"GFLOP/CPU-s": flop_per_image / row.ms["cpu"].median / 1e6}
        if row.name in work or row.name in apart:
            extra[row.name][OF_PEAK] = 100 / row.over_ceiling["cpu"].median
        if row.name in peaks:
            extra[row.name][PEAK] = peaks[row.name]
        if row.name in mb:
            extra[row.name][MEGABYTES] = mb[row.name]
        if row.name in ours:
            extra[row.name] |= ours[row.name].time_shares()
    return result.with_extra(extra)


def _other_step(size: Size, name: str) -> Callable[[], None]:
    """Returns the step of the reference or of a rival. Raises UserError if its package is missing."""
    torch.set_num_threads(size.threads)  # for another process, which starts with a thread per core
    config = size.config(precision=PrecisionConfig(channels_last=name in STEPS))
    step = STEPS.get(name, PlainStep)(config, num_classes=NUM_CLASSES, lr=LR, tau=TAU)
    return partial(step.run, noise_batch(config, num_classes=NUM_CLASSES))


def _own_step(size: Size, name: str) -> Callable[[], None]:
    """Returns one of our steps, for another process."""
    torch.set_num_threads(size.threads)
    if name == RETURNING:
        return _make_step(size, replace(VARIANTS[OURS], freed_memory="return")).run_on_noise
    return _variants(size)[name]().run_on_noise


def _variants(size: Size) -> dict[str, Callable[[], TrainingStep]]:
    """Returns a maker for each variant; a maker raises UserError if this machine cannot run it."""

    def compiled() -> TrainingStep:
        if not size.compile:
            raise UserError("takes a minute to compile: only without --quick")
        if reason := reason_not_to_compile(CPU, seconds=math.inf):
            raise UserError(reason)
        return _make_step(size, replace(VARIANTS[OURS], compile="yes"))

    variants: dict[str, Callable[[], TrainingStep]] = {name: partial(_make_step, size, precision) for name, precision in VARIANTS.items()}
    return variants | {ACCUMULATED: partial(_make_step, size, VARIANTS[OURS], rank_batch=size.batch // 2), COMPILED: compiled}


class PlainStep:
    """A step as in most libraries: the product's networks and loss, torch's own batch norm, torch-optimizer's LARS, solo-learn's update."""

    def __init__(self, config: TrainConfig, *, num_classes: int, lr: float, tau: float) -> None:
        torch.manual_seed(config.seed)
        self._byol = build_byol(config.model, num_classes=num_classes)
        convert_to_batchnorm(self._byol)
        self._optimizer = build_optimizer(OptimConfig(name="torch_optimizer_lars"), self._byol)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._tau = tau

    def run(self, batch: ViewBatch) -> None:
        """Takes one optimizer step."""
        online, target, views = self._byol.online, self._byol.target, (batch.view1, batch.view2)
        features = [online.encoder(view) for view in views]
        predictions = [online.predictor(online.projector(feature)) for feature in features]
        with torch.no_grad():
            projections = [target.projector(target.encoder(view)) for view in views]
        probe_loss = F.cross_entropy(self._byol.probe(features[0].detach()), batch.label)
        (byol_loss(*predictions, *projections) + probe_loss).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for source, follower in ((online.encoder, target.encoder), (online.projector, target.projector)):
            solo_learn_update(list(follower.parameters()), list(source.parameters()), self._tau)


def _make_step(size: Size, precision: PrecisionConfig, *, rank_batch: int = 0) -> TrainingStep:
    return TrainingStep(size.config(precision=precision, rank_batch=rank_batch), num_classes=NUM_CLASSES)


def _count_flop(step: Callable[[], None]) -> int:
    """Counts the operations of convolutions and matrix products, two per multiply-add."""
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return counter.get_total_flops()


def _convolution(flop_per_image: float) -> Subject:
    x = torch.randn(CONV_BATCH, CONV_CHANNELS, CONV_PX, CONV_PX, dtype=DTYPE).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(CONV_CHANNELS, CONV_CHANNELS, 3, 3, dtype=DTYPE).contiguous(memory_format=torch.channels_last)
    flop = 2 * 9 * CONV_CHANNELS**2 * CONV_PX**2 * CONV_BATCH
    run = torch.no_grad()(lambda: F.conv2d(x, weight, padding=1))
    return Subject(CEILING, run, units=flop / flop_per_image, calls=CONV_CALLS)


def _copy(megabytes_per_image: float) -> Subject:
    """Returns the memory ceiling; its GB/s count both reads and writes, as the bytes of a step do."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    out = torch.empty_like(source)
    return Subject(MEMORY, lambda: out.copy_(source), units=2 * COPY_BYTES / (1e6 * megabytes_per_image), calls=2, role="memory ceiling")


class ResNet18:
    """Measures the case `step` for ResNet-18 at 224 px, whose convolutions are 3x3 and wide, so less of its time is batch norm.

    How: as in `step`: one thread, batch 16. Reference: float32, NCHW, one view at a time, updates one tensor at a time. Ceiling: the
    step's operations at the rate of one convolution.

        python -m benchmarks.run step_resnet18

    Why: as in `step`. Its reference is closer to the peak, because a 3x3 convolution reorders its weights once for nine times the work.
    """

    QUICK = Size(model=ModelConfig(encoder="resnet18", hidden_dim=512), size_px=64, batch=4, rounds=6, compile=False, every_peak=False)
    FULL = Size(model=ModelConfig(encoder="resnet18"), size_px=224, batch=16, rounds=6)

    @staticmethod
    def run(size: Size, *, scratch: Path) -> CaseResult:
        return run(size, scratch=scratch, case="step_resnet18")
