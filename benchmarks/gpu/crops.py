"""Measures what eight GPUs run as typed, on one card: the step from uint8 crops, with augmentation, DDP and statistics over ranks.

How: a batch of noise crops in pinned memory, as the loader gives it; the product's `train_step` copies, augments and trains, compiled and
eager, at 256 and 512 images. First on a group of one rank (`cpu:gloo,cuda:nccl`) under DDP, whose batch norm takes the path over ranks
and sends its messages to itself; then without a group; then with each switch that only a GPU can judge (precision.cudnn_benchmark,
precision.pad_stem); and solo-learn's module at its best, eager, with torch's nn.SyncBatchNorm in the same group (which does nothing over
ranks where there is one: it favours the rival). Each variant is alone in memory. Reference: the path over ranks, eager. Ceiling: the
step's operations at the rate of a large bf16 matrix product. MiB: peak of the device's memory.

    python -m benchmarks.gpu_plan crops

Why: docs/performance.md derives from counted bytes what these should reach; a variant far below its figure shows which stage to look at.
The messages of one rank cost their launches only; NVLink's time comes on top.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.gpu import TINY_MODEL, Place
from benchmarks.gpu.step import matrix_product
from benchmarks.gpu.subjects import Variant, crops_batch, one_after_another
from benchmarks.gpu.syncs import PINNED
from benchmarks.record import CaseResult
from benchmarks.rival_steps import SoloLearnStep
from benchmarks.training_step import TrainingStep, noise_batch
from fastbyol.config.errors import UserError
from fastbyol.config.schema import ModelConfig, PrecisionConfig, TrainConfig
from fastbyol.config.views import ViewPair
from fastbyol.data.batch import ViewBatch
from fastbyol.models import use_all_ranks
from fastbyol.models.view_batchnorm import ViewBatchNorm
from fastbyol.monitors.compute import flop_per_image
from fastbyol.ranks.data_parallel import replicate
from fastbyol.tuning.candidates import reason_not_to_compile
from fastbyol.tuning.stepper import LR, TAU

NUM_CLASSES = 1000
RIVAL = "solo-learn's module at its best, nn.SyncBatchNorm, eager"
EAGER, COMPILED = PrecisionConfig(compile="no"), PrecisionConfig(compile="yes")
SWITCHED = {"cudnn.benchmark": {"cudnn_benchmark": True}, "padded stem": {"pad_stem": True}}


@dataclass(frozen=True)
class Size:
    model: ModelConfig
    size_px: int
    batches: tuple[int, ...]
    rounds: int
    matrix: int = 8192
    enough_s: float = 0.5
    compile: bool = True


FULL = Size(model=ModelConfig(encoder="resnet50"), size_px=224, batches=(256, 512), rounds=5)
TINY = Size(model=TINY_MODEL, size_px=32, batches=(4, 6), rounds=1, matrix=64, enough_s=0, compile=False)


def run(size: Size, *, place: Place) -> Iterator[CaseResult]:
    flop = flop_per_image(size.model, size_px=size.size_px)
    title = f"one BYOL step from crops, {size.model.encoder}, {size.size_px} px"
    ceiling = matrix_product(size.matrix, flop, place.device)
    yield from one_after_another("crops", title, variants(size, place), ceiling, settings=size, place=place)


def variants(size: Size, place: Place) -> dict[str, Variant]:
    """Returns what is measured, by name: the most telling first, for the time may end."""
    small, large = size.batches[0], size.batches[-1]
    found: dict[str, tuple[int, Callable[..., Any], dict[str, Any]]] = {
        f"over ranks, eager, {small}": (small, crop_step, {"precision": EAGER, "over_ranks": True}),
        f"over ranks, compiled, {small}": (small, crop_step, {"precision": COMPILED, "over_ranks": True}),
        f"over ranks, compiled, {large}": (large, crop_step, {"precision": COMPILED, "over_ranks": True}),
        f"{RIVAL}, {small}": (small, rival_step, {}),
        f"one process, compiled, {large}": (large, crop_step, {"precision": COMPILED}),
        f"one process, eager, {large}": (large, crop_step, {"precision": EAGER}),
    }
    for name, switch in SWITCHED.items():
        found[f"one process, compiled, {large}, {name}"] = large, crop_step, {"precision": replace(COMPILED, **switch)}
    return {name: Variant(partial(make, size, batch, place, **given), images=batch) for name, (batch, make, given) in found.items()}


@contextmanager
def crop_step(
    size: Size, batch: int, place: Place, *, precision: PrecisionConfig, over_ranks: bool = False
) -> Iterator[Callable[[], None]]:
    """Yields the product's step on a batch of crops. Raises UserError if this machine, or a dry run, does not compile."""
    if precision.compile == "yes":
        if not size.compile:
            raise UserError("takes a minute to compile: not in a dry run, and only with CUDA")
        if reason := reason_not_to_compile(place.device, seconds=float("inf")):
            raise UserError(reason)
    if place.device.type != "cuda" and precision.cudnn_benchmark:
        raise UserError("cuDNN needs CUDA")
    config = TrainConfig(global_batch=batch, model=size.model, views=ViewPair(size_px=size.size_px), precision=precision)
    with one_rank_group(place) if over_ranks else nullcontext():
        step = TrainingStep(config, num_classes=NUM_CLASSES, device=place.device)
        if over_ranks:
            state = step.networks()
            use_all_ranks(state.byol)
            state.model = replicate(state.byol, precision, accumulate=1)
        arriving = _arriving(config, place)
        try:
            yield lambda: step.run([arriving])
        finally:
            torch.backends.cudnn.benchmark = False


@contextmanager
def one_rank_group(place: Place) -> Iterator[None]:
    """Joins a process group of one rank, in which batch norm takes the path over ranks."""
    store = Path(place.scratch) / "one rank"
    store.unlink(missing_ok=True)
    backend = "cpu:gloo,cuda:nccl" if place.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(str(store), 1), rank=0, world_size=1)
    try:
        with mock.patch.object(ViewBatchNorm, "sees_other_ranks", True):
            yield
    finally:
        dist.destroy_process_group()


def _arriving(config: TrainConfig, place: Place) -> ViewBatch:
    batch = crops_batch(config.views, config.global_batch, num_classes=NUM_CLASSES)
    return batch._replace(**{name: getattr(batch, name).pin_memory() for name in PINNED}) if place.device.type == "cuda" else batch


@contextmanager
def rival_step(size: Size, batch: int, place: Place) -> Iterator[Callable[[], None]]:
    """Yields the rival's step on views already on the device: its augmentation is done by workers."""
    config = TrainConfig(global_batch=batch, model=size.model, views=ViewPair(size_px=size.size_px))
    with one_rank_group(place):
        step = SoloLearnStep(config, num_classes=NUM_CLASSES, lr=LR, tau=TAU, device=place.device)
        if place.device.type == "cuda":  # torch's class refuses a CPU
            step.synchronise()
        views = noise_batch(config, num_classes=NUM_CLASSES, device=place.device)
        yield partial(step.run, views)
