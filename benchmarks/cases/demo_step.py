"""Measures the demo's training (preset cpu_demo: ResNet-8, 32 px, batch 64), from given views and from files.

How: the product's `train_step` and loader, one epoch per round; one thread computes, one loads; JPEG files of about 47 x 40 px.
Reference: the same steps fed by torchvision.transforms on Pillow images in the training thread. Ceiling: the steps alone, on one
repeated batch. Read the wall clock: the loader's thread works beside the step.

    python -m benchmarks.run demo_step

Why: the loader costs a fraction of the step and runs beside it, so end to end is close to the steps alone if a core is free. What
remains is the start of each epoch, when nothing is prefetched, and other load on the machine. One thread computes because the network
is tiny and on a busy machine two threads lose far more at barriers (6.7 s instead of 0.13 s per step, seen at load 5).
`data_wait_share` is the share of the time that the step waited for a batch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.imagenet_like import write_imagenet_like
from benchmarks.record import CaseResult, make_result
from benchmarks.rivals.views import TorchvisionLoader
from benchmarks.timing import Subject, measure, torch_threads
from benchmarks.training_step import TrainingStep, synthetic_batch
from fastbyol.config.presets import preset_config
from fastbyol.config.schema import DataConfig
from fastbyol.data import build_loader
from fastbyol.data.conversion.beton_writer import write_beton

REFERENCE, CEILING, OURS = "end to end, torchvision on Pillow", "steps alone", "end to end, .beton"
PRESET = "cpu_demo"
THUMBNAIL = 0.1
"""Scale of ImageNet's sides that gives images of the demo's size."""
NUM_CLASSES = 10


@dataclass(frozen=True)
class Size:
    steps: int
    """Steps per epoch."""
    rounds: int
    batch: int = 64
    torch_threads: int = 1
    workers: int = 1
    """Threads of the loader."""
    seed: int = 0


QUICK = Size(steps=2, rounds=6, batch=32)
FULL = Size(steps=40, rounds=9)


def run(size: Size, *, scratch: Path) -> CaseResult:
    images = size.steps * size.batch
    folder = write_imagenet_like(scratch / "images", images=images, classes=NUM_CLASSES, scale=THUMBNAIL, seed=size.seed)
    write_beton(folder, out=scratch / "images.beton", workers=1)
    config = replace(preset_config(PRESET), global_batch=size.batch)
    batch = synthetic_batch(
        num=size.batch, size_px=config.views.size_px, num_classes=NUM_CLASSES, channels_last=config.precision.channels_last
    )
    torchvision = TorchvisionLoader(folder, config.views, batch=size.batch)
    steps = {name: TrainingStep(config, num_classes=NUM_CLASSES) for name in (CEILING, OURS, REFERENCE)}
    data = DataConfig(train=str(scratch / "images.beton"), workers=size.workers)
    with build_loader(data, views=config.views, seed=size.seed, global_batch=size.batch) as loader, torch_threads(size.torch_threads):
        subjects = [
            Subject(CEILING, lambda: steps[CEILING].run(itertools.repeat(batch, size.steps)), units=images),
            Subject(OURS, lambda: steps[OURS].run(loader), units=images),
            Subject(REFERENCE, lambda: steps[REFERENCE].run(torchvision), units=images, note="not beside the step"),
        ]
        timings = measure(subjects, rounds=size.rounds, warmed_up=lambda: [step.forget_times() for step in steps.values()])
    return make_result(
        "demo_step",
        f"preset {PRESET}, batch {size.batch}",
        subjects,
        timings,
        reference=REFERENCE,
        ceiling=CEILING,
        threads=size.torch_threads + size.workers,
        primary="wall",
        settings=size,
        extra={name: {"data_wait_share": steps[name].data_wait_share} for name in (OURS, REFERENCE)},
    )
