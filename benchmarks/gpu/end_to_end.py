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
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import TINY_MODEL, Place
from benchmarks.gpu.step import compute_rates
from benchmarks.gpu.subjects import measured_part
from benchmarks.imagenet_like import stored_for
from benchmarks.record import CaseResult
from benchmarks.timing import Subject, subjects_of
from benchmarks.training_step import StepSize, TrainingStep
from fastbyol.config.errors import UserError
from fastbyol.config.schema import DataConfig, ModelConfig, TrainConfig
from fastbyol.config.views import ViewPair
from fastbyol.data import build_loader
from fastbyol.data.backends.dali_source import DaliSource
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
class Size(StepSize):
    seed: int = 0


FULL = Size(model=ModelConfig(encoder="resnet50"), size_px=224, batch=128, rounds=6)
TINY = Size(model=TINY_MODEL, size_px=32, batch=4, rounds=1)


def run(size: Size, *, place: Place) -> CaseResult:
    config = size.config()
    skipped: dict[str, str] = {}
    with ExitStack() as opened:
        ways = {name: partial(_open, backend, output, size, place) for name, (backend, output) in WAYS.items()}
        loaders = _those_that_work(ways, REFERENCE, skipped, opened)
        subjects = _subjects(config, loaders, device=place.device)
        title = f"{size.model.encoder} from JPEG files, {size.size_px} px, batch {size.batch}, {place.workers} loader threads"
        given = {"threads": place.workers, "settings": size, "skipped": skipped, "place": place}
        result = measured_part("end_to_end", title, subjects, reference=REFERENCE, ceiling=CEILING, **given)
    training = {row.name for row in result.rows if not row.name.endswith(LOADER_ALONE)}
    uses_16_bits = training if config.precision.autocast == "bf16" else set()
    rates = compute_rates(result, flop_per_image(config.model, size_px=size.size_px), place.device, uses_16_bits=uses_16_bits)
    return result.with_extra({name: rates[name] for name in training})


def _open(
    backend: str, output: str, size: Size | DecodeSize, place: Place, *, stored: Path | None = None, dali_ops: str = "auto"
) -> TwoViewLoader:
    """Returns a loader of the images as `stored`, or converted for the backend here."""
    stored = stored or stored_for(backend, place.images, out=place.scratch, workers=place.workers)
    data = DataConfig(train=str(stored), backend=backend, workers=place.workers, dali_ops=dali_ops)
    views = ViewPair(size_px=size.size_px)
    return build_loader(data, views=views, seed=size.seed, global_batch=size.batch, device=place.device, output=output)


def _those_that_work(
    ways: Mapping[str, Callable[[], TwoViewLoader]], needed: str, skipped: dict[str, str], opened: ExitStack
) -> dict[str, TwoViewLoader]:
    """Returns the loaders that work here; the others go into `skipped`. Raises UserError if the needed one does not."""
    loaders: dict[str, TwoViewLoader] = {}
    for name, way in ways.items():
        try:
            loader = opened.enter_context(way())
            deque(loader, maxlen=0)  # DALI reports unsupported operations only at the first batch
            loaders[name] = loader
        except UserError as error:
            if name == needed:
                raise
            skipped[name] = str(error)
    return loaders


def _subjects(config: TrainConfig, loaders: dict[str, TwoViewLoader], *, device: torch.device) -> list[Subject]:
    steps = len(loaders[REFERENCE])
    images = steps * config.global_batch
    step = TrainingStep(config, num_classes=NUM_CLASSES, device=device)

    def train(batches: Iterable[ViewBatch]) -> None:
        step.run(batches)
        synchronize(device)

    def load(loader: TwoViewLoader) -> None:
        deque(loader, maxlen=0)
        synchronize(device)

    # The same networks for all subjects: copies of them would leave less memory for the batch.
    subjects = [Subject(CEILING, lambda: train(itertools.repeat(step.noise, steps)), units=images)]
    for name, loader in loaders.items():
        subjects.append(Subject(name, partial(train, loader), units=images))
        if name != REFERENCE:
            subjects.append(Subject(f"{name.split(':')[0]}: {LOADER_ALONE}", partial(load, loader), units=images))
    return subjects


@dataclass(frozen=True)
class DecodeSize:
    batch: int
    rounds: int
    size_px: int = 224
    seed: int = 0


class Decode:
    """Measures two uint8 crops of each image from its JPEG bytes, left on the device: nvJPEG through DALI compared with our kernel on the CPU.

    How: generated ImageNet-like files in tar shards, with one thread per core of the machine. Reference: decode and crop on the CPU,
    copied to the device. Ceiling: DALI's decoder alone ('mixed': Huffman decoding on the CPU or the GPU's JPEG engine, the rest on the
    GPU).

        python -m benchmarks.gpu_plan decode

    Why: a step needs 2,000 to 3,500 images/s per H100; a CPU core provides 300 to 700. On a machine with few cores the GPU's decoder can
    supply the step, at the price of some GPU time. The part `end_to_end` measures whole runs with the decoder beside the step.
    """

    CEILING, REFERENCE = "DALI: decode only", "CPU: decode, kernel's crops"
    FULL, TINY = DecodeSize(batch=256, rounds=6), DecodeSize(batch=4, rounds=1, size_px=16)

    @classmethod
    def run(cls, size: DecodeSize, *, place: Place) -> CaseResult:
        skipped: dict[str, str] = {}
        with ExitStack() as opened:
            shards = stored_for("dali", place.images, out=place.scratch, workers=place.workers)
            source = DaliSource(shards)  # UserError without DALI: the part is skipped
            opened.callback(source.close)
            images = source.num_samples // size.batch * size.batch
            # What DALI does of the work; the kernel does the rest.
            ops = {cls.REFERENCE: "decode", "DALI: decode, crops": "crop"}
            ways = {name: partial(_open, "dali", "uint8", size, place, stored=shards, dali_ops=done) for name, done in ops.items()}
            loaders = _those_that_work(ways, cls.REFERENCE, skipped, opened)
            work = {cls.CEILING: _decode_only(source, images, size.batch, place)}
            work |= {name: partial(_load_onto, place.device, loader) for name, loader in loaders.items()}
            title = f"two {size.size_px} px crops of an image from its JPEG bytes, batch {size.batch}"
            given = {"threads": place.workers, "settings": size, "skipped": skipped, "place": place}
            subjects = subjects_of(work, units=images)
            return measured_part("decode", title, subjects, reference=cls.REFERENCE, ceiling=cls.CEILING, **given)


def _load_onto(device: torch.device, loader: TwoViewLoader) -> None:
    """Runs an epoch whose views end on the device."""
    deque(((batch.view1.to(device), batch.view2.to(device)) for batch in loader), maxlen=0)
    synchronize(device)


def _decode_only(source: DaliSource, images: int, batch: int, place: Place) -> Callable[[], None]:
    """Returns a function that decodes all images from bytes in memory, a batch at a time."""
    from nvidia.dali import Pipeline, fn, types

    on_gpu = place.device.type == "cuda"
    names: Any = types
    device_id: Any = (place.device.index or 0) if on_gpu else None
    pipeline = Pipeline(batch_size=batch, num_threads=place.workers, device_id=device_id, prefetch_queue_depth=1)
    with pipeline:
        jpeg = fn.external_source(name="jpeg", dtype=names.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.image(jpeg, device="mixed" if on_gpu else "cpu", output_type=names.RGB, adjust_orientation=False))
    pipeline.build()
    jpegs = [np.array(source.jpeg(index)) for index in range(images)]

    def decode() -> None:
        for first in range(0, images, batch):
            pipeline.feed_input("jpeg", jpegs[first : first + batch])
            pipeline.run()
        synchronize(place.device)

    return decode
