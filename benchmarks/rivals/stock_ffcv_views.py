"""Two views from a .beton with FFCV's own Loader, as in FFCV-SSL: one pipeline per view, so each image is decoded twice.

Same file, images, crop areas and aspects, probabilities and magnitudes as ours, as far as FFCV has the operation. Differences: it has
no hue, grayscale, blur and solarization, so it does less work than a BYOL view needs; brightness, contrast and saturation are drawn
separately and blend as torchvision's do; OpenCV resizes by area.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastbyol.config.errors import UserError
from fastbyol.config.views import ViewPair, ViewSpec

MISSING = "ffcv is not installed; 'make install' builds it"
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
            os_cache=True,
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
