"""Measures two uint8 crops of each image from its JPEG bytes, left on the device: nvJPEG through DALI compared with our kernel on the CPU.

How: generated ImageNet-like files in tar shards, with one thread per core of the machine. Reference: decode and crop on the CPU,
copied to the device. Ceiling: DALI's decoder alone ('mixed': Huffman decoding on the CPU or the GPU's JPEG engine, the rest on the
GPU).

    python -m benchmarks.gpu_plan decode

Why: a step needs 2,000 to 3,500 images/s per H100; a CPU core provides 300 to 700. On a machine with few cores the GPU's decoder can
supply the step, at the price of some GPU time. The part `end_to_end` measures whole runs with the decoder beside the step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import Place
from benchmarks.gpu.subjects import part_result
from benchmarks.record import CaseResult
from benchmarks.timing import Subject, measure
from fastbyol.config.errors import UserError
from fastbyol.config.schema import DataConfig
from fastbyol.config.views import ViewPair
from fastbyol.data import build_loader
from fastbyol.data.backends.dali_source import DaliSource
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.data.loader import TwoViewLoader
from fastbyol.tuning.stepper import synchronize

CEILING, REFERENCE = "DALI: decode only", "CPU: decode, kernel's crops"
OURS = {"DALI: decode, crops": "crop"}


@dataclass(frozen=True)
class Size:
    batch: int
    rounds: int
    size_px: int = 224
    seed: int = 0


FULL = Size(batch=256, rounds=6)
TINY = Size(batch=4, rounds=1, size_px=16)


def run(size: Size, *, place: Place) -> CaseResult:
    shards = place.scratch / "shards"
    write_tar_shards(place.images, out=shards, workers=place.workers)
    with ExitStack() as opened:
        source = DaliSource(shards)  # UserError without DALI: the part is skipped
        opened.callback(source.close)
        images = source.num_samples // size.batch * size.batch
        subjects = [Subject(CEILING, _decode_only(source, images, size, place), units=images)]
        skipped: dict[str, str] = {}
        for name, ops in {REFERENCE: "decode", **OURS}.items():
            try:
                loader = opened.enter_context(_open(shards, ops, size, place))
                epoch = _epoch_of(loader, place.device)
                epoch()  # DALI reports unsupported operations only at the first batch
            except UserError as error:
                if name == REFERENCE:
                    raise
                skipped[name] = str(error)
            else:
                subjects.append(Subject(name, epoch, units=images))
        timings = measure(subjects, rounds=size.rounds)
    return part_result(
        "decode",
        f"two {size.size_px} px crops of an image from its JPEG bytes, batch {size.batch}",
        subjects,
        timings,
        reference=REFERENCE,
        ceiling=CEILING,
        threads=place.workers,
        settings=size,
        skipped=skipped,
        place=place,
    )


def _open(shards: Path, ops: str, size: Size, place: Place) -> TwoViewLoader:
    data = DataConfig(train=str(shards), backend="dali", workers=place.workers, dali_ops=ops)
    views = ViewPair(size_px=size.size_px)
    return build_loader(data, views=views, seed=size.seed, global_batch=size.batch, device=place.device, output="uint8")


def _epoch_of(loader: Iterable[Any], device: torch.device) -> Callable[[], None]:
    """Returns a function that runs an epoch whose views end on the device."""

    def epoch() -> None:
        deque(((batch.view1.to(device), batch.view2.to(device)) for batch in loader), maxlen=0)
        synchronize(device)

    return epoch


def _decode_only(source: DaliSource, images: int, size: Size, place: Place) -> Callable[[], None]:
    """Returns a function that decodes all images from bytes in memory, a batch at a time."""
    from nvidia.dali import Pipeline, fn, types

    on_gpu = place.device.type == "cuda"
    names: Any = types
    device_id: Any = (place.device.index or 0) if on_gpu else None
    pipeline = Pipeline(batch_size=size.batch, num_threads=place.workers, device_id=device_id, prefetch_queue_depth=1)
    with pipeline:
        jpeg = fn.external_source(name="jpeg", dtype=names.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.image(jpeg, device="mixed" if on_gpu else "cpu", output_type=names.RGB, adjust_orientation=False))
    pipeline.build()
    jpegs = [np.array(source.jpeg(index)) for index in range(images)]

    def decode() -> None:
        for first in range(0, images, size.batch):
            pipeline.feed_input("jpeg", jpegs[first : first + size.batch])
            pipeline.run()
        synchronize(place.device)

    return decode
