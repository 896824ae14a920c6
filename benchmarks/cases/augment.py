"""Measures two whole views of an already decoded image, on one thread.

How: the same images and the same drawn parameters for every subject, one after another, as in a loader's thread. Reference: the
kernel's crops, then `augment/torch_graph.py` run eagerly on the batch (the graph that a GPU compiles). Rival, if installed: the
kernel's crops, then kornia's batch augmentation, which draws its own parameters and uses torchvision's colour formulas
(`rivals/views.py`). Ceiling: the kernel's crops alone, as if everything after the resize were free.

    python -m benchmarks.run augment

Why: a crop reads part of a 470 x 400 image once. The colour operations and the blur then work on a view of 600 kB that stays in the
second-level cache, and only the operations that the view drew are run. The graph computes every operation for every image, because a
GPU's batch cannot branch per image, and each eager operation passes over the batch in main memory; here it is a correctness check of
the kernel, not a rival. kornia selects the images that drew an operation, but still passes over all of them once per operation.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.imagenet_like import draw_jpeg
from benchmarks.record import CaseResult, measured
from benchmarks.rivals import those_installed
from benchmarks.rivals.views import KORNIA_DIFFERENCES, KorniaViews
from benchmarks.timing import subjects_of, torch_threads
from fastbyol.augment.parameters import draw_parameters
from fastbyol.augment.view_kernel import ViewKernel
from fastbyol.config.views import ViewPair
from fastbyol.data.batch import ViewBatch, views_on_device

REFERENCE, CEILING, KERNEL = "kernel's crops + eager torch graph", "kernel: two crops (uint8)", "kernel: two views"
KORNIA = "kernel's crops + kornia"


@dataclass(frozen=True)
class Size:
    images: int
    """Number of different images, each rendered `calls` times per round."""
    rounds: int
    calls: int = 1
    size_px: int = 224
    scale: float = 1.0
    """Scale of ImageNet's image sides."""
    seed: int = 0


QUICK = Size(images=16, rounds=9)
FULL = Size(images=32, rounds=15, calls=4)


def run(size: Size, *, scratch: Path) -> CaseResult:
    views = ViewPair(size_px=size.size_px)
    executors = Executors(views, _draw_images(size), seed=size.seed)
    skipped: dict[str, str] = {}
    rivals = {
        name: partial(executors.crop_and, kornia) for name, kornia in those_installed({KORNIA: lambda: KorniaViews(views)}, skipped).items()
    }
    units, notes = size.images, {REFERENCE: "all operations for all images", KORNIA: KORNIA_DIFFERENCES}
    subjects = [
        *subjects_of({CEILING: executors.crop, KERNEL: executors.render}, units=units, calls=size.calls),
        *subjects_of({REFERENCE: executors.crop_and_augment, **rivals}, units=units, notes=notes, rivals=rivals),
    ]
    title = f"two {size.size_px} px views of a decoded image"
    with torch_threads(1):
        return measured("augment", title, subjects, reference=REFERENCE, ceiling=CEILING, settings=size, skipped=skipped)


class Executors:
    """Runs the same images and parameters through each executor; outputs are reused between calls, so their memory is already touched."""

    def __init__(self, pair: ViewPair, images: list[NDArray[np.uint8]], *, seed: int) -> None:
        self.pair, self.images = pair, images
        height, width = np.array([image.shape[:2] for image in images]).T
        self.parameters = draw_parameters(pair, seed=seed, epoch=0, index=np.arange(len(images)), height=height, width=width)
        self.kernel = ViewKernel.of(pair)
        shape = (len(images), 2, pair.size_px, pair.size_px, 3)
        self.crops, self.views = np.zeros(shape, dtype=np.uint8), np.zeros(shape, dtype=np.float32)

    def crop(self) -> None:
        self._render(self.crops)

    def render(self) -> None:
        self._render(self.views)

    def _render(self, outputs: NDArray[Any]) -> None:
        # The type of the output tells the kernel where to stop: uint8 crops are not augmented.
        for image, row, out in zip(self.images, self.parameters, outputs, strict=True):
            self.kernel.render(image, row, out)

    def crop_and_augment(self) -> None:
        nobody = torch.zeros(len(self.images), dtype=torch.int64)
        drawn = torch.from_numpy(self.parameters)
        self.crop_and(lambda crop1, crop2: views_on_device(ViewBatch(crop1, crop2, nobody, nobody, drawn), self.pair, torch.device("cpu")))

    def crop_and(self, augment: Callable[[Tensor, Tensor], object]) -> None:
        """Cuts the crops, then augments both views' batches of them, (N, 3, S, S) uint8 in channels-last memory."""
        self.crop()
        augment(*(torch.from_numpy(np.ascontiguousarray(self.crops[:, view])).permute(0, 3, 1, 2) for view in range(2)))


def _draw_images(size: Size) -> list[NDArray[np.uint8]]:
    images = []
    for index in range(size.images):
        jpeg = draw_jpeg(np.random.default_rng([size.seed, index]), direction=0.3, hue=index / size.images, scale=size.scale)
        images.append(np.array(Image.open(io.BytesIO(jpeg)).convert("RGB")))
    return images
