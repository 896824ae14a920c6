"""FFCV itself: its Loader, as in FFCV-SSL, and its DatasetWriter, as in its ImageNet example (Pillow decodes, JPEGs are re-encoded).

The loader makes two views from a .beton with one pipeline per view, so each image is decoded twice.

Same file, images, crop areas and aspects, probabilities and magnitudes as ours, as far as FFCV has the operation. Differences: it has
no hue, grayscale, blur and solarization, so it does less work than a BYOL view needs; brightness, contrast and saturation are drawn
separately and blend as torchvision's do; OpenCV resizes by area.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastbyol.config.errors import UserError
from fastbyol.config.views import ViewPair, ViewSpec
from fastbyol.data.inputs.listing import ImageListing

MISSING = "ffcv is not installed; 'make install' builds it"
QUALITY = 90
"""JPEG quality of the writer, FFCV's default."""
DIFFERENCES = "decodes twice; without hue, gray, blur, solarize"


class StockFfcvLoader:
    """Each iteration is an epoch of (label, view1, view2), made by one worker thread. Raises UserError if ffcv is not installed."""

    def __init__(self, beton: Path, pair: ViewPair, *, batch: int, seed: int) -> None:
        try:
            from ffcv.loader import Loader, OrderOption
            from ffcv.pipeline.pipeline_spec import PipelineSpec
        except ImportError as error:
            raise UserError(MISSING) from error
        _choose_numba_threads()
        pipelines: dict[str, Any] = {"image": None} | {
            name: PipelineSpec("image", decoder=_decoder(spec, pair), transforms=_transforms(spec, pair))
            for name, spec in (("view1", pair.view1), ("view2", pair.view2))
        }
        self._loader: Any = Loader(
            str(beton),
            batch_size=batch,
            num_workers=1,
            os_cache=True,  # the file is mapped, as ours is
            order=OrderOption.RANDOM,
            seed=seed,
            pipelines=pipelines,
            drop_last=True,
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)


def _choose_numba_threads() -> None:
    """Selects OpenMP: numba's first choice, TBB, once hung at the end of the process."""
    import numba

    settings: Any = numba.config
    settings.THREADING_LAYER = "omp"


def _decoder(spec: ViewSpec, pair: ViewPair) -> Any:
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder

    return RandomResizedCropRGBImageDecoder((pair.size_px, pair.size_px), scale=spec.crop_area, ratio=spec.crop_aspect)


def _transforms(spec: ViewSpec, pair: ViewPair) -> list[Any]:
    from ffcv import transforms

    mean, std = (255 * np.array(values) for values in (pair.mean, pair.std))
    to_float32: Any = np.float32
    return [
        transforms.RandomHorizontalFlip(spec.flip_p),
        transforms.RandomBrightness(spec.brightness, spec.jitter_p),
        transforms.RandomContrast(spec.contrast, spec.jitter_p),
        transforms.RandomSaturation(spec.saturation, spec.jitter_p),
        transforms.NormalizeImage(mean, std, to_float32),
        transforms.ToTensor(),
        transforms.ToTorchImage(),
    ]


class PillowImages:
    """(image, label) by index, as in torchvision.datasets.ImageFolder."""

    def __init__(self, listing: ImageListing) -> None:
        self._listing = listing

    def __len__(self) -> int:
        return len(self._listing.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(str(self._listing.path(index))) as file:
            return file.convert("RGB"), self._listing.labels[index]


def write_with_stock_ffcv(listing: ImageListing, out: Path, *, workers: int) -> None:
    """Writes a .beton of the whole listing; returns when its processes have ended."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        writer = DatasetWriter(
            str(out), {"image": RGBImageField(write_mode="jpg", jpeg_quality=QUALITY), "label": IntField()}, num_workers=workers
        )
        writer.from_indexed_dataset(PillowImages(listing))
    # The writer returns before its processes have ended, and the system counts the CPU time of ended ones only.
    for process in multiprocessing.active_children():
        process.join()
