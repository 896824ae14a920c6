"""Renders views with DALI: one pipeline decodes and crops, and optionally does the whole augmentation, on the GPU if there is one.

Crop boxes and all other parameters come from our sampler, so a view is the same as with any other backend. The crops differ from the CPU
kernel's by at most one of 255 levels, because the JPEG decoder and resampler round differently; a test checks this.

We have not run this on a GPU yet, where the same graph decodes with nvJPEG ('mixed'). It is tested on the CPU, where it is slower than the kernel.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastbyol.augment.parameters import (
    BRIGHTNESS,
    CONTRAST,
    CROP_H,
    CROP_W,
    CROP_X,
    CROP_Y,
    FLIP,
    GRAY,
    HUE,
    ORDER,
    SATURATION,
    SIGMA,
    SOLARIZE,
)
from fastbyol.config.errors import UserError, require_choice
from fastbyol.config.views import ViewPair, ViewSpec
from fastbyol.data.dali_loader import DaliSource, dali_reason
from fastbyol.data.renderer import Draw, Pending, Rendered, Renderer
from fastbyol.data.source import Indices

log = logging.getLogger("fastbyol")
OPS = ("crop", "all")
NATIVE_DIFFERENCES = (
    "hue and saturation are linear instead of in HSV (mean error 19 and 9 of 255), contrast turns about middle grey, in one fixed order; "
    "the blur reflects at the border"
)
"""Differences between views made with `ops` 'all' and the paper's, for a log line."""


class DaliRenderer(Renderer):
    """Renders two views of each image from one decode. One thread of ours feeds DALI's own threads.

    Args:
        source: reads the JPEGs.
        pair: augmentation of both views.
        ops: 'crop' makes uint8 crops, not mirrored, for `augment.torch_graph`; 'all' makes float32 views with DALI's own operations, for
            comparison only (`NATIVE_DIFFERENCES`).
        batch: images per batch, the same for all batches.
        workers: number of DALI's threads.
        prefetch: batches prepared ahead of the consumer.
        device: device on which the views are made and stay.

    Raises:
        UserError: DALI's operations cannot make these views, or DALI does not work on this device.
    """

    def __init__(
        self, source: DaliSource, pair: ViewPair, *, ops: str, batch: int, workers: int, prefetch: int, device: torch.device
    ) -> None:
        require_choice("data.dali_ops", ops, OPS)
        if ops == "all":
            _require_native(pair)
            log.warning("data.dali_ops all is not the paper's augmentation: %s", NATIVE_DIFFERENCES)
        super().__init__(source, threads=1, prefetch=prefetch)
        self._jpeg, self._ops, self._on_gpu = source.jpeg, ops, device.type == "cuda"
        self._held: deque[tuple[Any, Any]] = deque()
        try:
            self._pipeline = _pipeline(pair, ops=ops, batch=batch, threads=workers, device=device)
        except RuntimeError as error:
            raise UserError(f"data.dali_ops = {ops!r}: DALI cannot work on {device} ({dali_reason(error)}); use decode") from error

    def _submit(self, indices: Indices, draw: Draw) -> Pending:
        job = self._pool.submit(self._render, indices, draw)
        return Pending([job], job.result)

    def _render(self, indices: Indices, draw: Draw) -> Rendered:
        parameters = draw(indices, *self.source.sizes(indices))
        inputs = {"jpeg": [self._jpeg(index) for index in indices]}
        for view in range(2):
            inputs |= _arguments(parameters[:, view], view, colour=self._ops == "all")
        try:
            outputs = self._pipeline.run(**inputs)  # blocks until the device has finished
        except RuntimeError as error:
            for _ in self.source.decode(indices):  # raises an error that names the damaged image, if there is one; DALI's doesn't
                pass
            raise UserError(f"DALI failed ({dali_reason(error)}); use data.dali_ops decode") from error
        views = torch.stack([torch.from_dlpack(output.as_tensor()) for output in outputs])
        self._hold(outputs)
        return Rendered(indices, views, torch.from_numpy(parameters))

    def _hold(self, outputs: Any) -> None:
        """Keeps DALI's outputs alive until the GPU, which works asynchronously, has copied them: DALI would reuse their memory."""
        if not self._on_gpu:
            return
        copied = torch.cuda.Event()
        copied.record()
        self._held.append((copied, outputs))
        while self._held and self._held[0][0].query():
            self._held.popleft()


def _arguments(rows: NDArray[np.float32], view: int, *, colour: bool) -> dict[str, Any]:
    """Returns the pipeline's inputs for one view, from the sampler's rows (N, P)."""
    arguments = {"start": rows[:, [CROP_Y, CROP_X]], "extent": rows[:, [CROP_H, CROP_W]]}
    if colour:
        jitter, gray = rows[:, ORDER] >= 0, rows[:, GRAY] > 0
        arguments |= {
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


def _pipeline(pair: ViewPair, *, ops: str, batch: int, threads: int, device: torch.device) -> Any:
    """Builds the pipeline, whose inputs are JPEGs and each view's arguments and whose outputs are two batches (N, S, S, 3)."""
    from nvidia.dali import fn, pipeline_def, types

    names: Any = types  # DALI's stubs lack the names that its C++ part adds
    on_gpu = device.type == "cuda"

    @pipeline_def(enable_conditionals=True)
    def graph() -> Any:
        jpeg = fn.external_source(name="jpeg", dtype=names.UINT8, ndim=1)
        where = "mixed" if on_gpu else "cpu"
        image = fn.decoders.image(jpeg, device=where, output_type=names.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True)
        crops = [_crop(image, view, pair) for view in range(2)]
        return tuple(_native(crop, view, pair) for view, crop in enumerate(crops)) if ops == "all" else tuple(crops)

    device_id: Any = (device.index or 0) if on_gpu else None
    pipeline: Any = graph(batch_size=batch, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)
    pipeline.build()
    return pipeline


def _crop(image: Any, view: int, pair: ViewPair) -> Any:
    """Cuts out the box, then resizes it: pixels outside the box have no influence, as in the paper's code."""
    from nvidia.dali import fn, types

    names: Any = types
    interpolation = {"bicubic": names.INTERP_CUBIC, "bilinear": names.INTERP_LINEAR}[pair.interpolation]  # DALI's cubic has a = -0.5 too
    box = [fn.external_source(name=f"{name}{view}", dtype=names.FLOAT, ndim=1) for name in ("start", "extent")]
    cut = fn.slice(image, *box, axes=[0, 1], normalized_anchor=False, normalized_shape=False)
    return fn.resize(cut, size=[pair.size_px, pair.size_px], interp_type=interpolation, antialias=pair.antialias)


def _native(x: Any, view: int, pair: ViewPair) -> Any:
    """Applies the augmentations after the crop with DALI's own operations. The `if`s are DALI's conditionals, evaluated per image."""
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
    """Returns the solarization lookup table: the 256 levels, inverted from the threshold on."""
    return [float(level if level < 255 * spec.solarize_threshold else 255 - level) for level in range(256)]


def _require_native(pair: ViewPair) -> None:
    turned = max(pair.view1.rotation_deg, pair.view2.rotation_deg) > 0
    if turned or pair.semantics != "paper":
        what = "rotation" if turned else f"views.semantics {pair.semantics}"
        raise UserError(f"data.dali_ops = 'all': DALI's own operations have no {what}; use crop or decode")
