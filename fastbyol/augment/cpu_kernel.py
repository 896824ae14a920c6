"""The whole augmentation of a decoded image in one compiled call that releases the GIL: crop, resize, colour, blur, normalise.

Inside, a view lives in float32 planes [channel][x][y], that is transposed: then both passes of the resize run along contiguous
memory, and no gather is needed. Only rotation and the final store know about it; the other operations don't care.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import float32, int64, njit, types, uint8, void
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
    NUM_COLUMNS,
    ORDER,
    ROTATION_DEG,
    SATURATION,
    SIGMA,
    SOLARIZE,
)
from fastbyol.config.errors import require, require_choice
from fastbyol.config.views import SEMANTICS, ViewPair

OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": True, "error_model": "numpy"}
LANES = 16
"""Rows of the output that are resized together: one cache line of float32."""
TAP_GROUP = 4
"""Filter taps summed in one pass; tap counts are padded to a multiple with zero weights."""
NEGLIGIBLE = 1e-7
"""Blur weights below this cannot change a float32 sum of pixels in [0, 1]."""
TINY = 1e-8

ZERO, ONE, HALF, SIX, QUANTUM = np.float32(0), np.float32(1), np.float32(0.5), np.float32(6), np.float32(255)


@njit(**OPTIONS)
def _clip(x):
    return min(max(x, ZERO), ONE)


# ---- crop and resize


@njit(**OPTIONS)
def _filter(distance, cubic):
    """Keys' cubic with a = -0.5, or the triangle, at this distance (>= 0, in filter units)."""
    if not cubic:
        return max(1.0 - distance, 0.0)
    if distance < 1.0:
        return (1.5 * distance - 2.5) * distance * distance + 1.0
    if distance < 2.0:
        return ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    return 0.0


@njit(**OPTIONS)
def _resize_taps(n_in, n_out, cubic, antialias, gain):
    """Source positions and weights (n_out, taps): half-pixel centres, taps outside [0, n_in) dropped, the rest sums to gain."""
    scale = n_in / n_out
    stretch = max(scale, 1.0) if antialias else 1.0
    support = (2.0 if cubic else 1.0) * stretch
    taps = math.ceil(2.0 * support / TAP_GROUP) * TAP_GROUP
    position = np.empty((n_out, taps), np.int64)
    weight = np.empty((n_out, taps), np.float32)
    for o in range(n_out):
        centre = (o + 0.5) * scale - 0.5
        first = math.ceil(centre - support)
        total = 0.0
        for k in range(taps):
            i = first + k
            inside = 0 <= i < n_in
            value = _filter(abs(i - centre) / stretch, cubic) if inside else 0.0
            position[o, k] = min(max(i, 0), n_in - 1)
            weight[o, k] = value
            total += value
        for k in range(taps):
            weight[o, k] *= gain / total
    return position, weight


@njit(**OPTIONS)
def _sum_rows(image, top, begin, position, weight, out):
    """out[i] = sum over taps of weight * image[top + position, begin + i]: the vertical pass of one output row, still interleaved RGB."""
    for k in range(0, position.size, TAP_GROUP):
        a, b = image[top + position[k], begin:], image[top + position[k + 1], begin:]
        c, d = image[top + position[k + 2], begin:], image[top + position[k + 3], begin:]
        wa, wb, wc, wd = weight[k], weight[k + 1], weight[k + 2], weight[k + 3]
        if k == 0:
            for i in range(out.size):
                out[i] = wa * float32(a[i]) + wb * float32(b[i]) + wc * float32(c[i]) + wd * float32(d[i])
        else:
            for i in range(out.size):
                out[i] += wa * float32(a[i]) + wb * float32(b[i]) + wc * float32(c[i]) + wd * float32(d[i])


@njit(**OPTIONS)
def _sum_columns(columns, position, weight, planes, y):
    """The horizontal pass of LANES output rows: columns (3 * crop width, LANES) -> planes[:, :, y : y + LANES]."""
    size, pixel = planes.shape[1], 3 * LANES
    flat = columns.reshape(-1)
    for x in range(size):
        for k in range(0, position.shape[1], TAP_GROUP):
            a, b = flat[pixel * position[x, k] :], flat[pixel * position[x, k + 1] :]
            c, d = flat[pixel * position[x, k + 2] :], flat[pixel * position[x, k + 3] :]
            wa, wb, wc, wd = weight[x, k], weight[x, k + 1], weight[x, k + 2], weight[x, k + 3]
            for channel in range(3):
                out, at = planes[channel, x, y:], LANES * channel
                if size < LANES:
                    for j in range(size):
                        out[j] = wa * a[at + j] + wb * b[at + j] + wc * c[at + j] + wd * d[at + j] + (out[j] if k > 0 else ZERO)
                elif k == 0:  # a loop of constant length: the compiler makes straight vector code of it
                    for j in range(LANES):
                        out[j] = wa * a[at + j] + wb * b[at + j] + wc * c[at + j] + wd * d[at + j]
                else:
                    for j in range(LANES):
                        out[j] += wa * a[at + j] + wb * b[at + j] + wc * c[at + j] + wd * d[at + j]


@njit(**OPTIONS)
def _crop_resize(image, row, flip, cubic, antialias, planes, rows, columns):
    """image (H, 3 W) uint8, box of the parameter row -> planes in [0, 1], clipped. rows, columns: scratch (see `_carve`)."""
    size = planes.shape[1]
    crop_y, crop_x, width = int(row[CROP_Y]), 3 * int(row[CROP_X]), 3 * int(row[CROP_W])
    y_position, y_weight = _resize_taps(int(row[CROP_H]), size, cubic, antialias, 1.0 / 255.0)
    x_position, x_weight = _resize_taps(int(row[CROP_W]), size, cubic, antialias, 1.0)
    if flip:
        x_position, x_weight = x_position[::-1].copy(), x_weight[::-1].copy()
    for block in range(0, size, LANES):
        y = max(min(block, size - LANES), 0)  # the last block overlaps the one before: every block is whole
        for j in range(min(LANES, size)):
            _sum_rows(image, crop_y, crop_x, y_position[y + j], y_weight[y + j], rows[j, :width])
        for i in range(width):
            for j in range(LANES):
                columns[i, j] = rows[j, i]
        _sum_columns(columns, x_position, x_weight, planes, y)
    flat = planes.reshape(-1)
    for i in range(flat.size):
        flat[i] = _clip(flat[i])


@njit(**OPTIONS)
def _rotate(source, degrees, out):
    """Bilinear, counter-clockwise about the centre, edge pixels repeated; at least 2 px. Planes are transposed: the first axis is x."""
    size, area = source.shape[1], source.shape[1] * source.shape[1]
    flat = source.reshape(-1)
    centre, last = 0.5 * (size - 1), size - 1.0  # float64: at 224 px a float32 position is off by up to 1e-5 px
    angle = math.radians(np.float64(degrees))
    cos, sin = math.cos(angle), math.sin(angle)
    corner, over, down = np.empty(size, np.int64), np.empty(size, np.float32), np.empty(size, np.float32)
    for x in range(size):
        dx = x - centre
        for y in range(size):
            dy = y - centre
            from_x = min(max(centre + cos * dx - sin * dy, 0.0), last)
            from_y = min(max(centre + sin * dx + cos * dy, 0.0), last)
            left, top = min(int(from_x), size - 2), min(int(from_y), size - 2)
            corner[y], over[y], down[y] = left * size + top, from_x - left, from_y - top
        for c in range(3):
            a, b, line = flat[c * area :], flat[c * area + size :], out[c, x]
            for y in range(size):
                k = corner[y]
                upper = a[k] + over[y] * (b[k] - a[k])
                lower = a[k + 1] + over[y] * (b[k + 1] - a[k + 1])
                line[y] = upper + down[y] * (lower - upper)


# ---- colour


@njit(**OPTIONS)
def _brightness(planes, delta):
    flat = planes.reshape(-1)
    for i in range(flat.size):
        flat[i] = _clip(flat[i] + delta)


@njit(**OPTIONS)
def _scale(planes, factor):
    flat = planes.reshape(-1)
    for i in range(flat.size):
        flat[i] = _clip(flat[i] * factor)


@njit(**OPTIONS)
def _luma(red, green, blue):
    return float32(0.2989) * red + float32(0.5870) * green + float32(0.1140) * blue


@njit(**OPTIONS)
def _contrast(planes, factor, of_gray):
    """Away from the mean of each channel, or of the grey image."""
    mean = np.empty(3, np.float32)
    for c in range(3):
        total = 0.0
        for x in range(planes.shape[1]):
            line, line_total = planes[c, x], ZERO
            for y in range(line.size):
                line_total += line[y]
            total += line_total
        mean[c] = total / planes[c].size
    if of_gray:
        mean[:] = _luma(mean[0], mean[1], mean[2])
    for c in range(3):
        flat = planes[c].reshape(-1)
        offset = (ONE - factor) * mean[c]
        for i in range(flat.size):
            flat[i] = _clip(flat[i] * factor + offset)


@njit(**OPTIONS)
def _saturation(planes, factor):
    """HSV saturation times factor, clipped at 1, without leaving RGB: x -> v - (v - x) min(factor, v / chroma)."""
    red, green, blue = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    for i in range(red.size):
        r, g, b = red[i], green[i], blue[i]
        v = max(max(r, g), b)
        chroma = v - min(min(r, g), b)
        k = min(factor, v / max(chroma, float32(TINY)))
        red[i] = v - (v - r) * k
        green[i] = v - (v - g) * k
        blue[i] = v - (v - b) * k


@njit(**OPTIONS)
def _blend_with_gray(planes, factor):
    red, green, blue = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    for i in range(red.size):
        r, g, b = red[i], green[i], blue[i]
        y = (ONE - factor) * _luma(r, g, b)
        red[i] = _clip(r * factor + y)
        green[i] = _clip(g * factor + y)
        blue[i] = _clip(b * factor + y)


@njit(**OPTIONS)
def _sextant(k):
    """What a channel loses of the chroma at k sextants past its own turn, k in [0, 12)."""
    k -= SIX if k >= SIX else ZERO
    return _clip(min(k, float32(4) - k))


@njit(**OPTIONS)
def _hue(planes, delta):
    """HSV hue plus delta turns, without HSV arrays: x -> v - chroma clip(min(k, 4 - k)), k = 6 hue + {5, 3, 1} mod 6."""
    red, green, blue = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    shift = SIX * float32(delta - math.floor(delta))
    for i in range(red.size):
        r, g, b = red[i], green[i], blue[i]
        v = max(max(r, g), b)
        chroma = v - min(min(r, g), b)
        n = ONE / max(chroma, float32(TINY))
        h = (g - b) * n if r == v else ((b - r) * n + float32(2) if g == v else (r - g) * n + float32(4))
        h += shift  # in [-1, 11)
        h -= SIX if h >= SIX else ZERO
        h += SIX if h < ZERO else ZERO
        red[i] = v - chroma * _sextant(h + float32(5))
        green[i] = v - chroma * _sextant(h + float32(3))
        blue[i] = v - chroma * _sextant(h + ONE)


@njit(**OPTIONS)
def _jitter(planes, row, torchvision):
    code = int(row[ORDER])
    for place in range(4):
        op = (code >> (2 * (3 - place))) & 3
        if op == 0 and torchvision:
            _scale(planes, row[BRIGHTNESS])
        elif op == 0:
            _brightness(planes, row[BRIGHTNESS])
        elif op == 1:
            _contrast(planes, row[CONTRAST], torchvision)
        elif op == 2 and torchvision:
            _blend_with_gray(planes, row[SATURATION])
        elif op == 2:
            _saturation(planes, row[SATURATION])
        else:
            _hue(planes, row[HUE])


@njit(**OPTIONS)
def _grayscale(planes):
    red, green, blue = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    for i in range(red.size):
        y = _luma(red[i], green[i], blue[i])
        red[i], green[i], blue[i] = y, y, y


@njit(**OPTIONS)
def _solarize(planes, threshold):
    flat = planes.reshape(-1)
    for i in range(flat.size):
        flat[i] = flat[i] if flat[i] < threshold else ONE - flat[i]


# ---- blur


@njit(**OPTIONS)
def _gaussian(sigma, radius):
    """One side of the normalised window, zero padded for groups of taps, and the last place that counts."""
    weight = np.zeros(radius + TAP_GROUP + 1, np.float64)
    total = 0.0
    for i in range(radius + 1):
        weight[i] = math.exp(-(i * i) / (2.0 * sigma * sigma))
        total += weight[i] * (1.0 if i == 0 else 2.0)
    reach = 0
    out = np.zeros(weight.size, np.float32)
    for i in range(radius + 1):
        if weight[i] / total > NEGLIGIBLE:
            out[i] = weight[i] / total
            reach = i
    return out, reach


@njit(**OPTIONS)
def _blur(planes, sigma, radius, reflect, padded):
    """Separable Gaussian over zero or reflected padding; the latter needs radius < S. padded: (S + 2 (radius + 4), S) scratch."""
    size, edge = planes.shape[1], radius + TAP_GROUP
    w, reach = _gaussian(sigma, radius)
    if reach == 0:
        return
    line = np.zeros(size + 2 * edge, np.float32)
    padded[:edge] = ZERO
    padded[edge + size :] = ZERO
    for c in range(3):
        for x in range(size):  # along y, the contiguous axis
            for y in range(size):
                line[edge + y] = planes[c, x, y]
            if reflect:
                for k in range(1, reach + 1):
                    line[edge - k], line[edge + size - 1 + k] = line[edge + k], line[edge + size - 1 - k]
            _blur_line(line, w, reach, edge, padded[edge + x])
        if reflect:
            for k in range(1, reach + 1):
                padded[edge - k] = padded[edge + k]
                padded[edge + size - 1 + k] = padded[edge + size - 1 - k]
        for x in range(size):  # along x
            _blur_across(padded, w, reach, edge + x, planes[c, x])


@njit(**OPTIONS)
def _blur_line(line, w, reach, edge, out):
    for k in range(1, reach + 1, TAP_GROUP):
        wa, wb, wc, wd = w[k], w[k + 1], w[k + 2], w[k + 3]
        before, after = line[edge - k - 3 :], line[edge + k :]
        if k == 1:
            for i in range(out.size):
                near = w[0] * before[i + 4] + wa * (before[i + 3] + after[i]) + wb * (before[i + 2] + after[i + 1])
                out[i] = near + wc * (before[i + 1] + after[i + 2]) + wd * (before[i] + after[i + 3])
        else:
            for i in range(out.size):
                near = wa * (before[i + 3] + after[i]) + wb * (before[i + 2] + after[i + 1])
                out[i] += near + wc * (before[i + 1] + after[i + 2]) + wd * (before[i] + after[i + 3])


@njit(**OPTIONS)
def _blur_across(lines, w, reach, at, out):
    middle = lines[at]
    for k in range(1, reach + 1, TAP_GROUP):
        wa, wb, wc, wd = w[k], w[k + 1], w[k + 2], w[k + 3]
        a, b, c, d = lines[at - k], lines[at - k - 1], lines[at - k - 2], lines[at - k - 3]
        e, f, g, h = lines[at + k], lines[at + k + 1], lines[at + k + 2], lines[at + k + 3]
        if k == 1:
            for i in range(out.size):
                near = w[0] * middle[i] + wa * (a[i] + e[i]) + wb * (b[i] + f[i])
                out[i] = near + wc * (c[i] + g[i]) + wd * (d[i] + h[i])
        else:
            for i in range(out.size):
                out[i] += wa * (a[i] + e[i]) + wb * (b[i] + f[i]) + wc * (c[i] + g[i]) + wd * (d[i] + h[i])


# ---- whole views


@njit(**OPTIONS)
def _carve(scratch, size, radius, width):
    """Planes (two sets), padded lines, rows and columns out of one flat array; `_scratch_floats` is its length."""
    area = size * size
    planes, spare = scratch[: 3 * area].reshape(3, size, size), scratch[3 * area : 6 * area].reshape(3, size, size)
    used = 6 * area
    height = size + 2 * (radius + TAP_GROUP)
    padded = scratch[used : used + height * size].reshape(height, size)
    used += height * size
    rows = scratch[used : used + 3 * width * LANES].reshape(LANES, 3 * width)
    used += 3 * width * LANES
    columns = scratch[used : used + 3 * width * LANES].reshape(3 * width, LANES)
    return planes, spare, padded, rows, columns


def _scratch_floats(size: int, radius: int, width: int) -> int:
    return 6 * size * size + (size + 2 * (radius + TAP_GROUP)) * size + 6 * width * LANES


@njit(**OPTIONS)
def _store(planes, gain, offset, out):
    """Planes [c][x][y] -> (S, S, 3), clipped, x gain + offset; in tiles of x, so that the lines read stay in the nearest cache."""
    size = planes.shape[1]
    for x0 in range(0, size, LANES):
        for y in range(size):
            for x in range(x0, min(x0 + LANES, size)):
                for c in range(3):
                    out[y, x, c] = _clip(planes[c, x, y]) * gain[c] + offset[c]


@njit(**OPTIONS)
def _store_rounded(planes, out):
    """Planes [c][x][y] in [0, 1] -> (S, S, 3) uint8, rounded to nearest; in the same tiles."""
    size = planes.shape[1]
    for x0 in range(0, size, LANES):
        for y in range(size):
            for x in range(x0, min(x0 + LANES, size)):
                for c in range(3):
                    out[y, x, c] = uint8(planes[c, x, y] * QUANTUM + HALF)


def _render_views(image, parameters, cubic, antialias, torchvision, radius, gain, offset, scratch, out):
    """image (H, 3 W) uint8, parameters (V, columns) -> out (V, S, S, 3) float32, the whole augmentation."""
    planes, spare, padded, rows, columns = _carve(scratch, out.shape[1], radius, image.shape[1] // 3)
    for view in range(out.shape[0]):
        row = parameters[view]
        _crop_resize(image, row, row[FLIP] > 0, cubic, antialias, planes, rows, columns)
        if row[ROTATION_DEG] != 0 and out.shape[1] > 1:
            _rotate(planes, row[ROTATION_DEG], spare)
            planes, spare = spare, planes
        if row[ORDER] >= 0:
            _jitter(planes, row, torchvision)
        if row[GRAY] > 0:
            _grayscale(planes)
        if row[SIGMA] > 0:
            _blur(planes, row[SIGMA], radius, torchvision, padded)
        if row[SOLARIZE] <= ONE:
            _solarize(planes, row[SOLARIZE])
        _store(planes, gain, offset, out[view])


def _render_crops(image, parameters, cubic, antialias, scratch, out):
    """image (H, 3 W) uint8, parameters (V, columns) -> out (V, S, S, 3) uint8, cropped and resized, not mirrored."""
    planes, _, _, rows, columns = _carve(scratch, out.shape[1], 0, image.shape[1] // 3)
    for view in range(out.shape[0]):
        _crop_resize(image, parameters[view], False, cubic, antialias, planes, rows, columns)
        _store_rounded(planes, out[view])


_IMAGE = types.Array(uint8, 2, "C", readonly=True)  # read-only, so that one version serves PIL's arrays too
_ROWS = types.Array(float32, 2, "C", readonly=True)
_FLAG = types.boolean
_VIEWS_SIGNATURE = void(_IMAGE, _ROWS, _FLAG, _FLAG, _FLAG, int64, float32[::1], float32[::1], float32[::1], float32[:, :, :, ::1])
_CROPS_SIGNATURE = void(_IMAGE, _ROWS, _FLAG, _FLAG, float32[::1], uint8[:, :, :, ::1])


@functools.cache
def _compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    """Both entry points, compiled or loaded from numba's cache. Not at import: it costs seconds the first time."""
    return njit(_VIEWS_SIGNATURE, **OPTIONS)(_render_views), njit(_CROPS_SIGNATURE, **OPTIONS)(_render_crops)


class ViewKernel:
    """Renders the views of one decoded image. One object serves any number of threads; each thread has its own scratch memory.

    Args:
        size_px: side S of the square output.
        interpolation: 'bicubic' (Keys, a = -0.5) or 'bilinear'; half-pixel centres, taps outside the crop dropped, the rest renormalised.
        antialias: widen the filter when a crop is larger than the output.
        mean: per channel, in [0, 1].
        std: per channel.
        blur_taps: window of the Gaussian blur, odd.
        semantics: 'paper' or 'torchvision', see `config.views.SEMANTICS`. The latter's blur needs blur_taps < 2 size_px.
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
        require(
            not self._torchvision or blur_taps < 2 * size_px, "blur_taps", blur_taps, "less than twice size_px to reflect at the border"
        )
        self.size_px = size_px
        self._cubic, self._antialias, self._radius = interpolation == "bicubic", bool(antialias), blur_taps // 2
        self._gain = (1.0 / np.asarray(std, dtype=np.float64)).astype(np.float32)
        self._offset = (-np.asarray(mean, dtype=np.float64) / np.asarray(std, dtype=np.float64)).astype(np.float32)
        self._render_views, self._render_crops = _compiled()
        self._local = threading.local()

    @classmethod
    def of(cls, pair: ViewPair) -> ViewKernel:
        """The kernel that renders these views."""
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
        """Height and width. The compiled code reads memory unchecked: nothing wrong may get there."""
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
        """This thread's scratch memory, grown to the widest image it has seen."""
        scratch: NDArray[np.float32] | None = getattr(self._local, "scratch", None)
        floats = _scratch_floats(self.size_px, self._radius, width)
        if scratch is None or scratch.size < floats:
            scratch = np.empty(_scratch_floats(self.size_px, self._radius, width + width // 4), dtype=np.float32)
            self._local.scratch = scratch
        return scratch
