"""Measures whole training from files, as in ImageNet runs (the paper's views, JPEG files of ImageNet's size): read, decode, views, step.

How: the product's loader and `train_step`, one thread each; a round is an epoch. Reference: the same steps fed by
torchvision.transforms on Pillow images in the training thread. Ceiling: the steps alone, on one repeated batch. `loader alone` is
each backend without training: a run cannot be faster than the slower of the two. Read the wall clock, since the loader works beside
the step. MiB: the peak of resident memory of two epochs in a process of its own, libraries included.

    python -m benchmarks.run end_to_end

Why: on a CPU a step takes many times longer than loading its images, so end to end is the step plus the first batch of each epoch,
when nothing is prefetched, plus what the loader's thread takes from the cores of a busy machine. Memory is that of the steps, and of a
loader data.prefetch + 1 batches of float32 views and as many that wait to be used again. `data_wait_share` is the share of
the time that the step waited for a batch; above 5 % the title says data-bound, and what to change. On a GPU the step is a hundred
times faster and the loader becomes the first thing to look at (not measured yet).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.imagenet_like import stored_for, write_imagenet_like
from benchmarks.own_process import PEAK, peak_mib_of
from benchmarks.record import CaseResult, measured
from benchmarks.rivals.views import TorchvisionLoader
from benchmarks.timing import Subject, torch_threads
from benchmarks.training_step import StepSize, TrainingStep, forget_times
from fastbyol.config.errors import UserError
from fastbyol.config.presets import preset_config
from fastbyol.config.schema import DataConfig, ModelConfig, TrainConfig
from fastbyol.data import build_loader
from fastbyol.data.batch import ViewBatch
from fastbyol.data.loader import TwoViewLoader

REFERENCE, CEILING = "end to end, torchvision on Pillow", "steps alone"
DATA_BOUND_SHARE = 0.05
NUM_CLASSES = 10


@dataclass(frozen=True)
class Size(StepSize):
    steps: int = 8
    """Steps per epoch."""
    backends: tuple[str, ...] = ("ffcv", "dali", "folder")
    torch_threads: int = 1
    workers: int = 1
    """Threads of the loader."""
    scale: float = 1.0
    """Scale of ImageNet's image sides."""
    seed: int = 0
    peaks: bool = True
    """Measure the memory of each training row, each in one more process."""


QUICK = Size(steps=2, rounds=6, model=ModelConfig(encoder="resnet18", hidden_dim=512), size_px=64, batch=4, backends=("ffcv",))
FULL = Size(rounds=9, model=ModelConfig(encoder="resnet18"), size_px=224, batch=8)


def run(size: Size, *, scratch: Path) -> CaseResult:
    images = size.steps * size.batch
    folder = write_imagenet_like(scratch / "images", images=images, classes=min(NUM_CLASSES, images), scale=size.scale, seed=size.seed)
    config, training = size.config(), Training(size.config(), size.steps)
    kinds: dict[str, tuple[str, str]] = {CEILING: ("", ""), REFERENCE: ("torchvision", str(folder))}
    training.add(CEILING)
    training.add(REFERENCE, TorchvisionLoader(folder, config.views, batch=size.batch), note="not beside the step")
    skipped: dict[str, str] = {}
    with ExitStack() as opened:
        for backend in size.backends:
            try:
                stored = str(stored_for(backend, folder, out=scratch))
                loader = opened.enter_context(_loader(size, backend, stored))
            except UserError as error:
                skipped[backend] = str(error)
                continue
            training.add(f"{backend}: end to end", loader)
            kinds[f"{backend}: end to end"] = backend, stored
            training.subjects.append(Subject(f"{backend}: loader alone", partial(deque, loader, maxlen=0), units=images))
        result = training.measured(
            "end_to_end", f"{size.model.encoder} from JPEG files, {size.size_px} px, batch {size.batch}", size, skipped
        )
    if size.peaks:
        peaks = {name: {PEAK: peak_mib_of(_epoch, size, *kind, calls=2)} for name, kind in kinds.items()}
        result = result.with_extra(peaks)
    ours = {row.name: row.extra["data_wait_share"] for row in result.rows if row.role == "" and "data_wait_share" in row.extra}
    return replace(result, title=f"{result.title}: {verdict(ours)}")


def _loader(size: Size, backend: str, stored: str) -> TwoViewLoader:
    data = DataConfig(train=stored, backend=backend, workers=size.workers)
    return build_loader(data, views=size.config().views, seed=size.seed, global_batch=size.batch)


def _epoch(size: Size, kind: str, stored: str) -> Callable[[], None]:
    """Returns an epoch of the steps on these images, for another process. kind: a backend, torchvision, or '' for noise."""
    torch.set_num_threads(size.torch_threads)
    step = TrainingStep(size.config(), num_classes=NUM_CLASSES)
    if not kind:
        return partial(step.run_on_noise, size.steps)
    if kind == "torchvision":
        return partial(step.run, TorchvisionLoader(Path(stored), size.config().views, batch=size.batch))
    return partial(step.run, _loader(size, kind, stored))


class Training:
    """Subjects that take the same steps, each with networks of its own, from different sources of batches."""

    def __init__(self, config: TrainConfig, steps: int) -> None:
        self._config, self._num_steps = config, steps
        self._steps: dict[str, TrainingStep] = {}
        self.subjects: list[Subject] = []

    def add(self, name: str, batches: Iterable[ViewBatch] | None = None, *, note: str = "") -> None:
        """Adds the steps of an epoch on these batches; None: on one repeated batch of noise."""
        step = self._steps[name] = TrainingStep(self._config, num_classes=NUM_CLASSES)
        run = partial(step.run_on_noise, self._num_steps) if batches is None else partial(step.run, batches)
        self.subjects.append(Subject(name, run, units=self._num_steps * self._config.global_batch, note=note))

    def measured(self, case: str, title: str, size: Size | DemoSize, skipped: dict[str, str]) -> CaseResult:
        """Returns the result, with the share of its time that each but the ceiling waited for data."""
        with torch_threads(size.torch_threads):
            # In the first epoch a step waits for kernels to be compiled and files to be read into the cache.
            given = {"warmed_up": partial(forget_times, self._steps.values()), "skipped": skipped, "settings": size, "primary": "wall"}
            threads = size.torch_threads + size.workers
            result = measured(case, title, self.subjects, reference=REFERENCE, ceiling=CEILING, threads=threads, **given)
        waits = {name: {"data_wait_share": step.data_wait_share} for name, step in self._steps.items() if name != CEILING}
        return result.with_extra(waits)


def verdict(data_wait_share: dict[str, float]) -> str:
    """Returns which subjects wait for data, and the next thing to change."""
    bound = [f"{name} {share:.0%}" for name, share in data_wait_share.items() if share > DATA_BOUND_SHARE]
    if not bound:
        return f"compute-bound, no backend waits more than {DATA_BOUND_SHARE:.0%} for data; the step is what to speed up"
    return f"data-bound ({', '.join(bound)} of the time waiting); more data.workers, smaller files, or data.prefetch"


@dataclass(frozen=True)
class DemoSize:
    steps: int
    rounds: int
    batch: int = 64
    torch_threads: int = 1
    workers: int = 1
    seed: int = 0


class DemoStep:
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

    PRESET, OURS = "cpu_demo", "end to end, .beton"
    QUICK, FULL = DemoSize(steps=2, rounds=6, batch=32), DemoSize(steps=40, rounds=9)

    @classmethod
    def run(cls, size: DemoSize, *, scratch: Path) -> CaseResult:
        images = size.steps * size.batch
        # A tenth of ImageNet's sides: about the demo's images.
        folder = write_imagenet_like(scratch / "images", images=images, classes=NUM_CLASSES, scale=0.1, seed=size.seed)
        config = replace(preset_config(cls.PRESET), global_batch=size.batch)
        data = DataConfig(train=str(stored_for("ffcv", folder, out=scratch)), workers=size.workers)
        training = Training(config, size.steps)
        with build_loader(data, views=config.views, seed=size.seed, global_batch=size.batch) as loader:
            training.add(CEILING)
            training.add(cls.OURS, loader)
            training.add(REFERENCE, TorchvisionLoader(folder, config.views, batch=size.batch), note="not beside the step")
            return training.measured("demo_step", f"preset {cls.PRESET}, batch {size.batch}", size, {})
