"""Measures whole training from files, as in ImageNet runs (the paper's views, JPEG files of ImageNet's size): read, decode, views, step.

How: the product's loader and `train_step`, one thread each; a round is an epoch. Reference: the same steps fed by
torchvision.transforms on Pillow images in the training thread. Ceiling: the steps alone, on one repeated batch. `loader alone` is
each backend without training: a run cannot be faster than the slower of the two. Read the wall clock, since the loader works beside
the step.

    python -m benchmarks.run end_to_end

Why: on a CPU a step takes many times longer than loading its images, so end to end is the step plus the first batch of each epoch,
when nothing is prefetched, plus what the loader's thread takes from the cores of a busy machine. `data_wait_share` is the share of
the time that the step waited for a batch; above 5 % the title says data-bound, and what to change. On a GPU the step is a hundred
times faster and the loader becomes the first thing to look at (not measured yet).
"""

from __future__ import annotations

import itertools
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.imagenet_like import stored_for, write_imagenet_like
from benchmarks.record import CaseResult, make_result
from benchmarks.rivals.views import TorchvisionLoader
from benchmarks.timing import Subject, measure, torch_threads
from benchmarks.training_step import TrainingStep, synthetic_batch
from fastbyol.config.errors import UserError
from fastbyol.config.schema import DataConfig, ModelConfig, TrainConfig
from fastbyol.config.views import PAPER
from fastbyol.data import build_loader

REFERENCE, CEILING = "end to end, torchvision on Pillow", "steps alone"
DATA_BOUND_SHARE = 0.05
NUM_CLASSES = 10


@dataclass(frozen=True)
class Size:
    """Settings. steps: steps per epoch. workers: threads of the loader. scale: scale of ImageNet's image sides."""

    steps: int
    rounds: int
    model: ModelConfig
    size_px: int
    batch: int
    backends: tuple[str, ...] = ("ffcv", "dali", "folder")
    torch_threads: int = 1
    workers: int = 1
    scale: float = 1.0
    seed: int = 0


QUICK = Size(steps=2, rounds=6, model=ModelConfig(encoder="resnet18", hidden_dim=512), size_px=64, batch=4, backends=("ffcv",))
FULL = Size(steps=8, rounds=9, model=ModelConfig(encoder="resnet18"), size_px=224, batch=8)


def run(size: Size, *, scratch: Path) -> CaseResult:
    images = size.steps * size.batch
    folder = write_imagenet_like(scratch / "images", images=images, classes=min(NUM_CLASSES, images), scale=size.scale, seed=size.seed)
    config = TrainConfig(global_batch=size.batch, model=size.model, views=replace(PAPER, size_px=size.size_px))
    batch = synthetic_batch(num=size.batch, size_px=size.size_px, num_classes=NUM_CLASSES, channels_last=config.precision.channels_last)
    torchvision = TorchvisionLoader(folder, config.views, batch=size.batch)
    steps = {name: TrainingStep(config, num_classes=NUM_CLASSES) for name in (CEILING, REFERENCE, *map(_name, size.backends))}
    subjects = [
        Subject(CEILING, lambda: steps[CEILING].run(itertools.repeat(batch, size.steps)), units=images),
        Subject(REFERENCE, lambda: steps[REFERENCE].run(torchvision), units=images, note="not beside the step"),
    ]
    skipped: dict[str, str] = {}
    with ExitStack() as opened, torch_threads(size.torch_threads):
        for backend in size.backends:
            try:
                data = DataConfig(train=str(stored_for(backend, folder, out=scratch)), backend=backend, workers=size.workers)
                loader = opened.enter_context(build_loader(data, views=config.views, seed=size.seed, global_batch=size.batch))
            except UserError as error:
                skipped[backend] = str(error)
                continue
            step = steps[_name(backend)]
            subjects.append(Subject(_name(backend), lambda step=step, loader=loader: step.run(loader), units=images))
            subjects.append(Subject(f"{backend}: loader alone", lambda loader=loader: deque(loader, maxlen=0), units=images))
        timings = measure(subjects, rounds=size.rounds, warmed_up=lambda: [step.forget_times() for step in steps.values()])
    waits = {name: step.data_wait_share for name, step in steps.items() if name in timings and name != CEILING}
    ours = {name: share for name, share in waits.items() if name != REFERENCE}
    return make_result(
        "end_to_end",
        f"{size.model.encoder} from JPEG files, {size.size_px} px, batch {size.batch}: {verdict(ours)}",
        subjects,
        timings,
        reference=REFERENCE,
        ceiling=CEILING,
        threads=size.torch_threads + size.workers,
        primary="wall",
        settings=size,
        extra={name: {"data_wait_share": share} for name, share in waits.items()},
        skipped=skipped,
    )


def verdict(data_wait_share: dict[str, float]) -> str:
    """Returns which subjects wait for data, and the next thing to change."""
    bound = [f"{name} {share:.0%}" for name, share in data_wait_share.items() if share > DATA_BOUND_SHARE]
    if not bound:
        return f"compute-bound, no backend waits more than {DATA_BOUND_SHARE:.0%} for data; the step is what to speed up"
    return f"data-bound ({', '.join(bound)} of the time waiting); more data.workers, smaller files, or data.prefetch"


def _name(backend: str) -> str:
    return f"{backend}: end to end"
