"""Measures training from JPEG files on the device: images/s per GPU, and whether data or the step is the limit.

How: the product's loader (one thread per core, uint8 crops, augmentation on the device) and `train_step` on generated ImageNet-like
files; one epoch per round. Reference: views made completely on the CPU, from the image folder. Ceiling: the steps alone, on one
repeated batch. Backends that are not installed are left out. `loader alone` is a backend without training. The files are in the page
cache, so no disk is measured.

    python -m benchmarks.gpu_plan end_to_end

Why: the loader works beside the step, so a run is as fast as the slower of the two, plus the first batch of each epoch, which nothing
hides (a real epoch has a hundred times as many batches).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from benchmarks.gpu import TINY_MODEL, Place
from benchmarks.gpu.step import compute_rates
from benchmarks.gpu.subjects import part_result
from benchmarks.imagenet_like import stored_for
from benchmarks.record import CaseResult
from benchmarks.timing import Subject, measure
from benchmarks.training_step import TrainingStep, synthetic_batch
from fastbyol.config.errors import UserError
from fastbyol.config.schema import DataConfig, ModelConfig, TrainConfig
from fastbyol.config.views import ViewPair
from fastbyol.data import build_loader
from fastbyol.data.batch import ViewBatch
from fastbyol.data.loader import TwoViewLoader
from fastbyol.monitors.compute import flop_per_image
from fastbyol.tuning.stepper import synchronize

CEILING, REFERENCE = "steps alone", "folder, views on the CPU"
WAYS = {REFERENCE: ("folder", "float32"), **{f"{backend}: end to end": (backend, "uint8") for backend in ("ffcv", "dali", "folder")}}
"""Backend and loader output of each subject."""
LOADER_ALONE = "loader alone"
NUM_CLASSES = 10


@dataclass(frozen=True)
class Size:
    model: ModelConfig
    size_px: int
    batch: int
    rounds: int
    seed: int = 0


FULL = Size(model=ModelConfig(encoder="resnet50"), size_px=224, batch=128, rounds=6)
TINY = Size(model=TINY_MODEL, size_px=32, batch=4, rounds=1)


def run(size: Size, *, place: Place) -> CaseResult:
    config = TrainConfig(global_batch=size.batch, model=size.model, views=ViewPair(size_px=size.size_px))
    skipped: dict[str, str] = {}
    with ExitStack() as opened:
        loaders: dict[str, TwoViewLoader] = {}
        for name, (backend, output) in WAYS.items():
            try:
                loaders[name] = opened.enter_context(_open(config, backend, output, size, place))
                _load(loaders[name], place.device)  # a backend reports unsupported operations only at the first batch
            except UserError as error:
                skipped[name] = str(error)
                loaders.pop(name, None)
        if REFERENCE in skipped:
            raise UserError(f"{REFERENCE}: {skipped[REFERENCE]}")
        steps = len(loaders[REFERENCE])
        subjects = _subjects(config, loaders, steps=steps, device=place.device)
        timings = measure(subjects, rounds=size.rounds)
    training = {name: timing for name, timing in timings.items() if not name.endswith(LOADER_ALONE)}
    flop, uses_16_bits = flop_per_image(config.model, size_px=size.size_px), config.precision.autocast == "bf16"
    return part_result(
        "end_to_end",
        f"{size.model.encoder} from JPEG files, {size.size_px} px, batch {size.batch}, {place.workers} loader threads",
        subjects,
        timings,
        reference=REFERENCE,
        ceiling=CEILING,
        threads=place.workers,
        settings=size,
        extra=compute_rates(training, flop, place.device, uses_16_bits=lambda _: uses_16_bits),
        skipped=skipped,
        place=place,
    )


def _open(config: TrainConfig, backend: str, output: str, size: Size, place: Place) -> TwoViewLoader:
    data = DataConfig(
        train=str(stored_for(backend, place.images, out=place.scratch, workers=place.workers)), backend=backend, workers=place.workers
    )
    return build_loader(data, views=config.views, seed=size.seed, global_batch=size.batch, device=place.device, output=output)


def _load(loader: TwoViewLoader, device: torch.device) -> None:
    """Loads an epoch without training."""
    deque(loader, maxlen=0)
    synchronize(device)


def _subjects(config: TrainConfig, loaders: dict[str, TwoViewLoader], *, steps: int, device: torch.device) -> list[Subject]:
    held = synthetic_batch(
        num=config.global_batch, size_px=config.views.size_px, num_classes=NUM_CLASSES, channels_last=True, device=device
    )
    step, images = TrainingStep(config, num_classes=NUM_CLASSES, device=device), steps * config.global_batch

    def train(batches: Iterable[ViewBatch]) -> None:
        step.run(batches)
        synchronize(device)

    subjects = [Subject(CEILING, lambda: train(itertools.repeat(held, steps)), units=images)]
    for name, loader in loaders.items():
        subjects.append(Subject(name, lambda loader=loader: train(loader), units=images))
        if name != REFERENCE:
            subjects.append(Subject(f"{name.split(':')[0]}: {LOADER_ALONE}", lambda loader=loader: _load(loader, device), units=images))
    return subjects
