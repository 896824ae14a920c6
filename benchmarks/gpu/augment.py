"""Measures `augment/torch_graph.py` on the device, from uint8 crops to normalised float32 views, two views of each image.

How: the paper's views, drawn as in training, on crops of noise already on the device. Reference: the graph run eagerly. Ceiling: a
device copy that reads and writes as many bytes as the graph must (1 byte in and 4 out for each of an image's 301,056 numbers).

    python -m benchmarks.gpu_plan augment

Why: eager mode passes over the batch in memory some 300 times. Compiled, the graph is a few kernels, separated by the image's mean
(contrast) and the two passes of the blur, so it should come within several times of the copy. GB/s counts the bytes that have to
move, not those that do.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from benchmarks.gpu import Place
from benchmarks.gpu.subjects import ENOUGH_S, device_subject, part_result
from benchmarks.record import CaseResult
from benchmarks.timing import measure
from fastbyol.augment.parameters import draw_parameters
from fastbyol.augment.torch_graph import augment_batch
from fastbyol.config.views import ViewPair

REFERENCE, CEILING = "eager", "copy of as many bytes"
BYTES_IN, BYTES_OUT = 1, 4


@dataclass(frozen=True)
class Size:
    """Settings. backend: backend of torch.compile."""

    batch: int
    rounds: int
    size_px: int = 224
    backend: str = "inductor"
    enough_s: float = ENOUGH_S
    seed: int = 0


FULL = Size(batch=256, rounds=9)
TINY = Size(batch=2, rounds=1, size_px=16, backend="eager", enough_s=0)


@torch.no_grad()
def run(size: Size, *, place: Place) -> CaseResult:
    pair, device = ViewPair(size_px=size.size_px), place.device
    crops, parameters = _inputs(size, pair, device)
    compiled = torch.compile(augment_batch, dynamic=False, fullgraph=True, backend=size.backend)
    options = {"blur_taps": pair.blur_taps, "mean": pair.mean, "std": pair.std, "semantics": pair.semantics}

    def both_views(augment: object) -> None:
        for view in range(2):
            augment(crops, parameters[view], **options)  # type: ignore[operator]

    moved = 2 * crops.numel() * (BYTES_IN + BYTES_OUT)
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    work = {
        REFERENCE: lambda: both_views(augment_batch),
        "compiled": lambda: both_views(compiled),
        CEILING: lambda: copy.copy_(source),
    }
    subjects = [device_subject(name, do, device=device, units=size.batch, enough_s=size.enough_s) for name, do in work.items()]
    timings = measure(subjects, rounds=size.rounds)
    per_image = moved / size.batch
    return part_result(
        "augment",
        f"two {size.size_px} px views from crops on the device, batch {size.batch}",
        subjects,
        timings,
        reference=REFERENCE,
        ceiling=CEILING,
        settings=size,
        extra={name: {"GB/s": per_image / median(timing.ms["wall"]) / 1e6} for name, timing in timings.items()},
        place=place,
    )


def _inputs(size: Size, pair: ViewPair, device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns crops (N, 3, S, S) uint8 channels-last, and the drawn parameters of each view."""
    side = np.full(size.batch, 2 * size.size_px)
    drawn = draw_parameters(pair, seed=size.seed, epoch=0, index=np.arange(size.batch), height=side, width=side)
    generator = torch.Generator().manual_seed(size.seed)
    crops = torch.randint(0, 256, (size.batch, size.size_px, size.size_px, 3), dtype=torch.uint8, generator=generator)
    return crops.to(device).permute(0, 3, 1, 2), [torch.from_numpy(drawn[:, view]).to(device) for view in range(2)]
