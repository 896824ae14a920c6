"""The whole augmentation of a decoded image in one compiled call that releases the GIL: crop, resize, colour, blur, normalise.

Every filter runs across lines: it sums whole lines, each with one weight, so all memory access is contiguous and no gather is needed.
The image is therefore transposed between the two directions of a filter. The resize leaves a view as float32 planes [channel][x][y];
colour operations work on either layout; the blur's result, which the store reads, has planes [channel][y][x].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from numba import float32, int64, types, uint8, void

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
    ROTATION_DEG,
    SATURATION,
    SIGMA,
    SOLARIZE,
)
from fastbyol.augment.transpose_kernel import OPTIONS, transpose
from fastbyol.host.compile_cache import njit

LANES = 32
"""Rows of the output that are resized together; with 16 the overhead of the loops becomes noticeable."""
TAP_GROUP = 4
"""Filter taps summed in one pass; the number of taps is padded to a multiple with zero weights."""
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
    """Returns the weight of Keys' cubic with a = -0.5, or of the triangle, at this distance (>= 0, in filter units)."""
    if not cubic:
        return max(1.0 - distance, 0.0)
    if distance < 1.0:
        return (1.5 * distance - 2.5) * distance * distance + 1.0
    if distance < 2.0:
        return ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    return 0.0


@njit(**OPTIONS)
def _resize_taps(n_in, n_out, cubic, antialias, gain):
    """Returns source positions and weights (n_out, taps): half-pixel centres; taps outside [0, n_in) are dropped, the rest sum to gain."""
    # As tf.image.resize does; torch's bicubic without antialias has a = -0.75.
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
    """Sums weight * image[top + position, begin + i] over taps into out[i]: the vertical pass of one output row, still interleaved RGB."""
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
    """Runs the horizontal pass of LANES output rows: columns (3 * crop width, LANES) -> planes[:, :, y : y + LANES]."""
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
                elif k == 0:  # a constant number of iterations lets the compiler emit straight-line vector code
                    for j in range(LANES):
                        out[j] = wa * a[at + j] + wb * b[at + j] + wc * c[at + j] + wd * d[at + j]
                else:
                    for j in range(LANES):
                        out[j] += wa * a[at + j] + wb * b[at + j] + wc * c[at + j] + wd * d[at + j]


@njit(**OPTIONS)
def _crop_resize(image, row, flip, cubic, antialias, planes, rows, columns):
    """Resizes the crop box of the parameter row from image (H, 3 W) uint8 to planes in [0, 1], clipped. rows, columns: see `_carve`."""
    size = planes.shape[1]
    crop_y, crop_x, width = int(row[CROP_Y]), 3 * int(row[CROP_X]), 3 * int(row[CROP_W])
    y_position, y_weight = _resize_taps(int(row[CROP_H]), size, cubic, antialias, 1.0 / 255.0)
    x_position, x_weight = _resize_taps(int(row[CROP_W]), size, cubic, antialias, 1.0)
    if flip:
        x_position, x_weight = x_position[::-1].copy(), x_weight[::-1].copy()
    for block in range(0, size, LANES):
        # The last block overlaps the one before, so that every block is whole.
        y = max(min(block, size - LANES), 0)
        for j in range(min(LANES, size)):
            _sum_rows(image, crop_y, crop_x, y_position[y + j], y_weight[y + j], rows[j, :width])
        transpose(rows.reshape(-1), 0, LANES, width, rows.shape[1], columns.reshape(-1), 0, LANES)
        _sum_columns(columns, x_position, x_weight, planes, y)
    flat = planes.reshape(-1)
    for i in range(flat.size):
        flat[i] = _clip(flat[i])


@njit(**OPTIONS)
def _rotate(source, degrees, out):
    """Rotates bilinearly, counter-clockwise about the centre, edge pixels repeated; at least 2 px. The planes' first axis is x."""
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
    """Moves pixels away from the mean of each channel, or of the grey image."""
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
    """Multiplies HSV saturation by factor, clipped at 1, without leaving RGB: x -> v - (v - x) min(factor, v / chroma)."""
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
    """Returns the share of the chroma that a channel lacks at k sextants from its own hue, k in [0, 12)."""
    k -= SIX if k >= SIX else ZERO
    return _clip(min(k, float32(4) - k))


@njit(**OPTIONS)
def _hue(planes, delta):
    """Adds delta turns to the HSV hue without HSV arrays: x -> v - chroma clip(min(k, 4 - k)), k = 6 hue + {5, 3, 1} mod 6."""
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
    """Returns one side of the normalised window, zero-padded for groups of taps, and the last position with a significant weight."""
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
def _blur(planes, sigma, radius, reflect, padded, out):
    """Blurs with a separable Gaussian over zero or reflected padding; the latter needs radius < S. Planes [c][x][y] -> out [c][y][x].

    Overwrites planes and padded, (S + 2 (radius + TAP_GROUP), S).
    """
    size, edge = planes.shape[1], radius + TAP_GROUP
    w, reach = _gaussian(sigma, radius)
    lines, inside = padded.reshape(-1), edge * size
    for c in range(3):
        flat, turned = planes[c].reshape(-1), out[c].reshape(-1)
        middle = lines[inside:]
        for i in range(flat.size):
            middle[i] = flat[i]
        _pad(padded, reach, edge, reflect)
        _blur_across(lines, size, w, reach, edge, flat)
        transpose(flat, 0, size, size, size, lines, inside, size)
        _pad(padded, reach, edge, reflect)
        _blur_across(lines, size, w, reach, edge, turned)


@njit(**OPTIONS)
def _pad(padded, reach, edge, reflect):
    """Fills the lines around the image: reflected ones as far as the blur reaches, zeros elsewhere."""
    last = padded.shape[0] - 1 - edge
    padded[:edge] = ZERO
    padded[last + 1 :] = ZERO
    if reflect:
        for k in range(1, reach + 1):
            padded[edge - k] = padded[edge + k]
            padded[last + k] = padded[last - k]


@njit(**OPTIONS)
def _blur_across(lines, size, w, reach, edge, out):
    """Writes to out the weighted sum over the lines before and after each line, as one long loop over all lines."""
    middle = lines[edge * size :]
    for i in range(out.size):
        out[i] = w[0] * middle[i]
    for k in range(1, reach + 1, TAP_GROUP):
        wa, wb, wc, wd = w[k], w[k + 1], w[k + 2], w[k + 3]
        before, after = (edge - k) * size, (edge + k) * size
        a, b, c, d = lines[before:], lines[before - size :], lines[before - 2 * size :], lines[before - 3 * size :]
        e, f, g, h = lines[after:], lines[after + size :], lines[after + 2 * size :], lines[after + 3 * size :]
        for i in range(out.size):
            out[i] += wa * (a[i] + e[i]) + wb * (b[i] + f[i]) + wc * (c[i] + g[i]) + wd * (d[i] + h[i])


# ---- whole views


@njit(**OPTIONS)
def _carve(scratch, size, radius, width):
    """Divides one flat array into planes (two sets), padded lines, rows and columns; `scratch_floats` is its length."""
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


def scratch_floats(size: int, radius: int, width: int) -> int:
    """Returns the number of scratch floats for views of side `size`, a blur of this radius, and images up to `width` pixels."""
    return 6 * size * size + (size + 2 * (radius + TAP_GROUP)) * size + 6 * width * LANES


@njit(**OPTIONS)
def _turn(planes, out):
    """Sets out [c][y][x] = planes [c][x][y]."""
    size = planes.shape[1]
    for c in range(3):
        transpose(planes[c].reshape(-1), 0, size, size, size, out[c].reshape(-1), 0, size)


@njit(**OPTIONS)
def _store(planes, gain, offset, out):
    """Writes planes [c][y][x] to (S, S, 3), clipped, times gain plus offset; float32, or uint8 truncated."""
    red, green, blue, pixels = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1), out.reshape(-1)
    for i in range(red.size):
        pixels[3 * i] = _clip(red[i]) * gain[0] + offset[0]
        pixels[3 * i + 1] = _clip(green[i]) * gain[1] + offset[1]
        pixels[3 * i + 2] = _clip(blue[i]) * gain[2] + offset[2]


def _render_views(image, parameters, cubic, antialias, torchvision, radius, gain, offset, scratch, out):
    """Runs the whole augmentation: image (H, 3 W) uint8, parameters (V, columns) -> out (V, S, S, 3) float32."""
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
            _blur(planes, row[SIGMA], radius, torchvision, padded, spare)
        else:
            _turn(planes, spare)
        if row[SOLARIZE] <= ONE:
            _solarize(spare, row[SOLARIZE])
        _store(spare, gain, offset, out[view])


def _render_crops(image, parameters, cubic, antialias, scratch, out):
    """Crops and resizes without flipping: image (H, 3 W) uint8, parameters (V, columns) -> out (V, S, S, 3) uint8."""
    planes, turned, _, rows, columns = _carve(scratch, out.shape[1], 0, image.shape[1] // 3)
    levels, half = np.full(3, QUANTUM), np.full(3, HALF)
    for view in range(out.shape[0]):
        _crop_resize(image, parameters[view], False, cubic, antialias, planes, rows, columns)
        _turn(planes, turned)
        _store(turned, levels, half, out[view])


_IMAGE = types.Array(uint8, 2, "C", readonly=True)  # read-only, so that one version serves PIL's arrays too
_ROWS = types.Array(float32, 2, "C", readonly=True)
_FLAG = types.boolean
_VIEWS_SIGNATURE = void(_IMAGE, _ROWS, _FLAG, _FLAG, _FLAG, int64, float32[::1], float32[::1], float32[::1], float32[:, :, :, ::1])
_CROPS_SIGNATURE = void(_IMAGE, _ROWS, _FLAG, _FLAG, float32[::1], uint8[:, :, :, ::1])


@functools.cache
def compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    """Returns both entry points, compiled or loaded from numba's cache. Not done at import, since it takes seconds the first time."""
    return njit(_VIEWS_SIGNATURE, **OPTIONS)(_render_views), njit(_CROPS_SIGNATURE, **OPTIONS)(_render_crops)
