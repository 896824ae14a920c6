"""Measures `augment/torch_graph.py` on the device, from uint8 crops to normalised float32 views, two views of each image.

How: the paper's views, drawn as in training, on crops of noise already on the device. Reference: the graph run eagerly. Ceiling: a
device copy that reads and writes as many bytes as the graph must (1 byte in and 4 out for each of an image's 301,056 numbers).

    python -m benchmarks.gpu_plan augment

Why: eager mode launches some 500 operations a batch (741 MB an image, counted). Compiled, the graph is a few kernels, separated by the image's mean
(contrast) and the two passes of the blur, so it should come within several times of the copy. GB/s counts the bytes that have to
move, not those that do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gpu import Place
from benchmarks.gpu.subjects import ENOUGH_S, crops_batch, device_subjects, measured_part
from benchmarks.record import CaseResult
from fastbyol.augment.torch_graph import augment_batch
from fastbyol.config.views import ViewPair

REFERENCE, CEILING = "eager", "copy of as many bytes"
BYTES_IN, BYTES_OUT = 1, 4


@dataclass(frozen=True)
class Size:
    batch: int
    rounds: int
    size_px: int = 224
    backend: str = "inductor"
    """Backend of torch.compile."""
    enough_s: float = ENOUGH_S
    seed: int = 0


FULL = Size(batch=256, rounds=9)
TINY = Size(batch=2, rounds=1, size_px=16, backend="eager", enough_s=0)


@torch.no_grad()
def run(size: Size, *, place: Place) -> CaseResult:
    pair = ViewPair(size_px=size.size_px)
    batch = crops_batch(pair, size.batch, seed=size.seed)
    views = [(crops.to(place.device), drawn.to(place.device)) for crops, drawn in zip(batch[:2], batch.parameters.unbind(1), strict=True)]
    options = {"blur_taps": pair.blur_taps, "mean": pair.mean, "std": pair.std, "semantics": pair.semantics}

    def both_views(augment: object) -> None:
        for crops, parameters in views:
            augment(crops, parameters, **options)  # type: ignore[operator]

    moved = sum(crops.numel() for crops, _ in views) * (BYTES_IN + BYTES_OUT)
    # A copy reads and writes, so it moves twice the bytes of its source.
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=place.device)
    copy = torch.empty_like(source)
    work = {
        REFERENCE: partial(both_views, augment_batch),
        "compiled": partial(both_views, torch.compile(augment_batch, dynamic=False, fullgraph=True, backend=size.backend)),
        CEILING: lambda: copy.copy_(source),
    }
    subjects = device_subjects(work, device=place.device, units=size.batch, enough_s=size.enough_s)
    title = f"two {size.size_px} px views from crops on the device, batch {size.batch}"
    result = measured_part("augment", title, subjects, reference=REFERENCE, ceiling=CEILING, settings=size, place=place)
    return result.with_extra({row.name: {"GB/s": moved / size.batch / row.ms["wall"].median / 1e6} for row in result.rows})
