"""The compiled CPU kernel as an object: checks its inputs and gives each thread its own scratch memory."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.augment.cpu_kernel import compiled, scratch_floats
from fastbyol.augment.parameters import CROP_W, CROP_Y, NUM_COLUMNS
from fastbyol.config.errors import require, require_choice
from fastbyol.config.views import SEMANTICS, ViewPair

_CACHE_LINE_BYTES = 64


class ViewKernel:
    """Renders the views of one decoded image. One object serves any number of threads; each thread has its own scratch memory.

    The arguments are those of `ViewPair`; torchvision's blur needs blur_taps < 2 size_px.
    """

    def __init__(
        self,
        *,
        size_px: int,
        interpolation: str = "bicubic",
        antialias: bool = False,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        blur_taps: int,
        semantics: str = "paper",
    ) -> None:
        require_choice("semantics", semantics, SEMANTICS)
        require_choice("interpolation", interpolation, ("bicubic", "bilinear"))
        require(size_px >= 1, "size_px", size_px, "at least 1")
        require(blur_taps >= 1 and blur_taps % 2 == 1, "blur_taps", blur_taps, "an odd number >= 1")
        self._torchvision = semantics == "torchvision"
        fits = not self._torchvision or blur_taps < 2 * size_px
        require(fits, "blur_taps", blur_taps, "less than twice size_px to reflect at the border")
        self.size_px = size_px
        self._cubic, self._antialias, self._radius = interpolation == "bicubic", bool(antialias), blur_taps // 2
        self._gain = (1.0 / np.asarray(std, dtype=np.float64)).astype(np.float32)
        self._offset = (-np.asarray(mean, dtype=np.float64) / np.asarray(std, dtype=np.float64)).astype(np.float32)
        self._render_views, self._render_crops = compiled()
        self._local = threading.local()

    @classmethod
    def of(cls, pair: ViewPair) -> ViewKernel:
        """Builds the kernel that renders these views."""
        return cls(
            size_px=pair.size_px,
            interpolation=pair.interpolation,
            antialias=pair.antialias,
            mean=pair.mean,
            std=pair.std,
            blur_taps=pair.blur_taps,
            semantics=pair.semantics,
        )

    def render(self, image: NDArray[np.uint8], parameters: NDArray[np.float32], out: NDArray[np.float32] | NDArray[np.uint8]) -> None:
        """Fills out, one view for each parameter row.

        Args:
            image: (H, W, 3) uint8, C-contiguous.
            parameters: (V, NUM_COLUMNS) float32 (columns: `parameters.COLUMNS`), boxes inside the image.
            out: (V, S, S, 3), C-contiguous. float32: the whole augmentation, clipped and normalised. uint8: crop and resize only,
                rounded to nearest; flip and everything after it are left to `torch_graph.augment_batch`.

        Raises:
            ValueError: a shape, type or memory layout other than the above, or a crop box that leaves the image.
        """
        height, width = self._check(image, parameters, out)
        pixels = image.reshape(height, 3 * width)
        if out.dtype == np.float32:
            switches = self._cubic, self._antialias, self._torchvision
            self._render_views(pixels, parameters, *switches, self._radius, self._gain, self._offset, self._scratch(width), out)
        else:
            self._render_crops(pixels, parameters, self._cubic, self._antialias, self._scratch(width), out)

    def _check(self, image: NDArray[Any], parameters: NDArray[Any], out: NDArray[Any]) -> tuple[int, int]:
        """Checks the arrays and returns height and width. The compiled code does not check bounds, so nothing wrong may reach it."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.flags.c_contiguous or image.size == 0:
            raise ValueError(f"image: {image.dtype} {image.shape}, must be C-contiguous uint8 (H, W, 3)")
        views = len(parameters)
        if parameters.shape != (views, NUM_COLUMNS) or parameters.dtype != np.float32 or not parameters.flags.c_contiguous:
            raise ValueError(f"parameters: {parameters.dtype} {parameters.shape}, must be C-contiguous float32 (V, {NUM_COLUMNS})")
        wanted = (views, self.size_px, self.size_px, 3)
        if out.shape != wanted or out.dtype not in (np.float32, np.uint8) or not out.flags.c_contiguous:
            raise ValueError(f"out: {out.dtype} {out.shape}, must be C-contiguous float32 or uint8 {wanted}")
        height, width = image.shape[:2]
        for y, x, crop_h, crop_w in parameters[:, CROP_Y : CROP_W + 1].tolist():
            if not (y >= 0 and x >= 0 and 1 <= crop_h <= height - y and 1 <= crop_w <= width - x):
                raise ValueError(f"crop y {y:g}, x {x:g}, h {crop_h:g}, w {crop_w:g}: must lie inside the {height} x {width} image")
        return height, width

    def _scratch(self, width: int) -> NDArray[np.float32]:
        """Returns this thread's scratch memory, grown to the widest image seen so far."""
        scratch: NDArray[np.float32] | None = getattr(self._local, "scratch", None)
        floats = scratch_floats(self.size_px, self._radius, width)
        if scratch is None or scratch.size < floats:
            floats = scratch_floats(self.size_px, self._radius, width + width // 4)
            memory = np.empty(floats + _CACHE_LINE_BYTES // 4, dtype=np.float32)
            first = -memory.ctypes.data % _CACHE_LINE_BYTES // 4  # vector loads that straddle cache lines take half as long again
            self._local.scratch = scratch = memory[first : first + floats]
        return scratch
