"""DALI doing all of a view by its own operations, as its examples have it: decoded once, cropped and augmented in one DALI pipeline on the CPU.

It is given our sampler's draws, so that it does as much work as we do, but it is not the paper's augmentation (`DIFFERENCES`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastbyol.augment.parameters import BRIGHTNESS, CONTRAST, FLIP, GRAY, HUE, ORDER, SATURATION, SIGMA, SOLARIZE
from fastbyol.config.views import ViewPair, ViewSpec
from fastbyol.data.backends.dali_source import DaliSource, decoded_jpeg
from fastbyol.data.backends.source import Indices
from fastbyol.data.dali_renderer import box_arguments, crop
from fastbyol.data.loader import TwoViewLoader
from fastbyol.data.renderer import Draw, Pending, Rendered, Renderer
from fastbyol.data.traversal import Traversal

DIFFERENCES = (
    "hue and saturation are linear instead of in HSV (mean error 19 and 9 of 255), contrast turns about middle grey, in one fixed order; "
    "the blur reflects at the border"
)
"""Differences between these views and the paper's."""


def dali_native_loader(shards: Path, views: ViewPair, *, batch: int, workers: int, seed: int, prefetch: int = 3) -> TwoViewLoader:
    """Returns a loader of two normalised float32 views by DALI's operations, in the order of our own loaders. UserError without DALI."""
    source = DaliSource(shards)
    renderer = DaliNativeRenderer(source, views, batch=batch, workers=workers, prefetch=prefetch)
    return TwoViewLoader(renderer, views=views, traversal=Traversal(source.num_samples, seed, batch))


class DaliNativeRenderer(Renderer):
    """Makes both views of each image from one decode. The pair must have the paper's semantics and no rotation, which DALI lacks."""

    def __init__(self, source: DaliSource, pair: ViewPair, *, batch: int, workers: int, prefetch: int) -> None:
        super().__init__(source, threads=1, prefetch=prefetch)
        self._jpeg, self._pipeline = source.jpeg, _pipeline(pair, batch=batch, threads=workers)

    def _submit(self, indices: Indices, draw: Draw) -> Pending:
        job = self._pool.submit(self._render, indices, draw)
        return Pending([job], job.result)

    def _render(self, indices: Indices, draw: Draw) -> Rendered:
        parameters = draw(indices, *self.source.sizes(indices))
        inputs: dict[str, Any] = {"jpeg": [self._jpeg(index) for index in indices]}
        for view in range(2):
            inputs |= box_arguments(parameters[:, view], view) | _colour_arguments(parameters[:, view], view)
        views = torch.stack([torch.from_dlpack(output.as_tensor()) for output in self._pipeline.run(**inputs)])
        return Rendered(indices, views, torch.from_numpy(parameters))


def _colour_arguments(rows: NDArray[np.float32], view: int) -> dict[str, NDArray[Any]]:
    """Returns the pipeline's inputs for one view besides its box, from the sampler's rows (N, P)."""
    jitter, gray = rows[:, ORDER] >= 0, rows[:, GRAY] > 0
    arguments = {
        "flip": rows[:, FLIP].astype(np.int32),
        "brightness": np.where(jitter, rows[:, BRIGHTNESS], 0),
        "contrast": np.where(jitter, rows[:, CONTRAST], 1),
        "saturation": np.where(gray, 0, np.where(jitter, rows[:, SATURATION], 1)),
        "hue_deg": np.where(jitter, 360 * rows[:, HUE], 0),
        "sigma": rows[:, SIGMA],
        "solarize": rows[:, SOLARIZE] <= 1,
    }
    return {f"{name}{view}": np.ascontiguousarray(_as_dali_takes(value)) for name, value in arguments.items()}


def _as_dali_takes(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(np.float32) if values.dtype == np.float64 else values


def _pipeline(pair: ViewPair, *, batch: int, threads: int) -> Any:
    """JPEGs and each view's arguments in, two batches (N, S, S, 3) out."""
    from nvidia.dali import pipeline_def

    @pipeline_def(enable_conditionals=True)
    def graph() -> Any:
        image = decoded_jpeg(on_gpu=False)
        return tuple(_native(crop(image, view, pair), view, pair) for view in range(2))

    pipeline: Any = graph(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=1)
    pipeline.build()
    return pipeline


def _native(x: Any, view: int, pair: ViewPair) -> Any:
    """All that follows the crop as DALI's own operations. The `if`s are DALI's conditionals: by image."""
    from nvidia.dali import fn, types

    names: Any = types
    kinds = {"flip": names.INT32, "solarize": names.BOOL}
    wanted = ("flip", "brightness", "contrast", "saturation", "hue_deg", "sigma", "solarize")
    given: dict[str, Any] = {name: fn.external_source(name=f"{name}{view}", dtype=kinds.get(name, names.FLOAT), ndim=0) for name in wanted}
    x = fn.brightness_contrast(x, brightness_shift=given["brightness"], contrast=given["contrast"])
    x = fn.hsv(x, hue=given["hue_deg"], saturation=given["saturation"])
    if given["sigma"] > 0:
        x = fn.gaussian_blur(x, window_size=pair.blur_taps, sigma=given["sigma"])
    if given["solarize"]:
        x = fn.lookup_table(x, keys=list(range(256)), values=_solarized((pair.view1, pair.view2)[view]), dtype=names.UINT8)
    mean, std = ([255 * value for value in values] for values in (pair.mean, pair.std))
    return fn.crop_mirror_normalize(x, mean=mean, std=std, mirror=given["flip"], output_layout="HWC", dtype=names.FLOAT)


def _solarized(spec: ViewSpec) -> list[float]:
    """Each of the 256 levels, turned round from the threshold on."""
    return [float(level if level < 255 * spec.solarize_threshold else 255 - level) for level in range(256)]
