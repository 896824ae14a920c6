"""The augmentation of a batch of crops as one graph that torch.compile can trace: no data-dependent control flow, no synchronisation.

Every image goes through every operation; an operation that it did not draw gets its neutral parameter or is masked. Contrast needs the
image's mean, so the jitter consists of three slots of pixelwise operations, contrast once, and three slots again; the drawn order
decides which slot does what.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbyol.augment.parameters import BRIGHTNESS, CONTRAST, FLIP, GRAY, HUE, ORDER, ROTATION_DEG, SATURATION, SIGMA, SOLARIZE
from fastbyol.config.errors import require_choice
from fastbyol.config.views import SEMANTICS

TINY = 1e-8
_IS_BRIGHTNESS, _IS_CONTRAST, _IS_SATURATION, _IS_HUE, _IS_NOTHING = 0, 1, 2, 3, -1
_AHEAD = (5.0, 3.0, 1.0)
"""Sextants added to the hue for red, green and blue."""


def augment_batch(
    crops: Tensor,
    parameters: Tensor,
    *,
    blur_taps: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
    rotate: bool = False,
    semantics: str = "paper",
) -> Tensor:
    """Applies everything after crop and resize: (N, 3, S, S) in channels-last memory and of this dtype, normalised.

    Args:
        crops: (N, 3, S, S) uint8, channels-last, on any device.
        parameters: (N, NUM_COLUMNS) float32 on the same device (columns: `parameters.COLUMNS`); the crop columns are not used.
        blur_taps, mean, std, semantics: as in `ViewPair`; torchvision's blur needs blur_taps < 2 S.
        dtype: dtype of the result.
        rotate: apply the rotation column; without it the graph contains no rotation.
    """
    require_choice("semantics", semantics, SEMANTICS)
    torchvision = semantics == "torchvision"
    # In float32 whatever `dtype` is: half precision is too coarse for thresholds and hues.
    x = crops.to(torch.float32) / 255
    x = torch.where(_column(parameters, FLIP) > 0, x.flip(3), x)
    if rotate:
        x = _rotate(x, parameters[:, ROTATION_DEG])
    x = _jitter(x, parameters, torchvision)
    x = torch.where(_column(parameters, GRAY) > 0, _luma(x), x)
    if blur_taps > 1:
        window = _half_window(parameters[:, SIGMA], blur_taps // 2)
        padding = "reflect" if torchvision else "constant"
        x = _blur(_blur(x, window, dim=3, padding=padding), window, dim=2, padding=padding)
    x = torch.where(x < _column(parameters, SOLARIZE), x, 1 - x).clamp(0, 1)
    # Per channel with Python numbers: a tensor made from a list would be a synchronising copy to the device.
    x = torch.cat([x[:, c : c + 1] * (1 / std[c]) - mean[c] / std[c] for c in range(3)], dim=1)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def _column(parameters: Tensor, column: int) -> Tensor:
    return parameters[:, column].view(-1, 1, 1, 1)


def _jitter(x: Tensor, parameters: Tensor, torchvision: bool) -> Tensor:
    code = parameters[:, ORDER].to(torch.int64)
    jittered = code >= 0
    ops = [(code.clamp_min(0) >> (2 * (3 - place))) & 3 for place in range(4)]
    before = jittered  # whether contrast is still to come
    for op in ops[:3]:
        before = before & (op != _IS_CONTRAST)
        x = _pixelwise(x, parameters, torch.where(before, op, _IS_NOTHING), torchvision)
    mean = x.mean(dim=(2, 3), keepdim=True)
    mean = _luma(mean) if torchvision else mean
    contrasted = (_column(parameters, CONTRAST) * (x - mean) + mean).clamp(0, 1)
    x = torch.where(jittered.view(-1, 1, 1, 1), contrasted, x)
    after = torch.zeros_like(jittered)
    for previous, op in pairwise(ops):
        after = after | (jittered & (previous == _IS_CONTRAST))
        x = _pixelwise(x, parameters, torch.where(after, op, _IS_NOTHING), torchvision)
    return x


def _pixelwise(x: Tensor, parameters: Tensor, op: Tensor, torchvision: bool) -> Tensor:
    """Applies brightness, saturation, hue or nothing, as each image's op says; the closed forms of `cpu_kernel`, without HSV arrays."""
    op = op.view(-1, 1, 1, 1)
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    inverse = 1 / chroma.clamp_min(TINY)
    brightness, saturation = _column(parameters, BRIGHTNESS), _column(parameters, SATURATION)
    if torchvision:
        bright, grey = (x * brightness).clamp(0, 1), _luma(x)
        saturated = (saturation * (x - grey) + grey).clamp(0, 1)
    else:
        bright = (x + brightness).clamp(0, 1)
        saturated = value - (value - x) * torch.minimum(saturation, value * inverse)
    of_blue = torch.where(green == value, (blue - red) * inverse + 2, (red - green) * inverse + 4)
    sextants = torch.where(red == value, (green - blue) * inverse, of_blue) + 6 * _column(parameters, HUE)
    turned = torch.cat([_loss(sextants + ahead) for ahead in _AHEAD], dim=1)
    hued = value - chroma * turned
    x = torch.where(op == _IS_BRIGHTNESS, bright, x)
    x = torch.where(op == _IS_SATURATION, saturated, x)
    return torch.where(op == _IS_HUE, hued, x)


def _loss(sextants: Tensor) -> Tensor:
    """Returns the share of the chroma that a channel lacks at this many sextants from its own hue."""
    sextants = sextants - 6 * torch.floor(sextants * (1 / 6))
    return torch.minimum(sextants, 4 - sextants).clamp(0, 1)


def _luma(x: Tensor) -> Tensor:
    return 0.2989 * x[:, 0:1] + 0.5870 * x[:, 1:2] + 0.1140 * x[:, 2:3]


def _half_window(sigma: Tensor, radius: int) -> Tensor:
    """Returns (N, radius + 1) weights from the centre outwards; sigma 0 is the identity."""
    place = torch.arange(radius + 1, device=sigma.device, dtype=sigma.dtype)
    window = torch.exp(-(place * place) / (2 * sigma.clamp_min(1e-2)[:, None] ** 2))
    window = window / (window[:, :1] + 2 * window[:, 1:].sum(1, keepdim=True))
    return torch.where(sigma[:, None] > 0, window, (place == 0).to(window.dtype))


def _blur(x: Tensor, window: Tensor, *, dim: int, padding: str) -> Tensor:
    """Applies a symmetric filter along one dimension over a padded border, as shifted additions that fuse into one kernel."""
    radius, length = window.shape[1] - 1, x.shape[dim]
    padded = F.pad(x, [radius, radius, 0, 0] if dim == 3 else [0, 0, radius, radius], mode=padding)
    out = x * window[:, 0].view(-1, 1, 1, 1)
    for k in range(1, radius + 1):
        pair = padded.narrow(dim, radius - k, length) + padded.narrow(dim, radius + k, length)
        out = out + window[:, k].view(-1, 1, 1, 1) * pair
    return out


def _rotate(x: Tensor, degrees: Tensor) -> Tensor:
    """Rotates bilinearly, counter-clockwise about the centre, edge pixels repeated, as `reference.rotate` does."""
    num, channels, size, _ = x.shape
    # Positions in float64: at 224 px a float32 position is off by up to 1e-5 px.
    angle = (degrees.to(torch.float64) * (math.pi / 180)).view(-1, 1, 1)
    axis = torch.arange(size, device=x.device, dtype=torch.float64) - (size - 1) / 2
    across, down = axis.view(1, 1, -1), axis.view(1, -1, 1)
    from_x = (torch.cos(angle) * across - torch.sin(angle) * down + (size - 1) / 2).clamp(0, size - 1)
    from_y = (torch.sin(angle) * across + torch.cos(angle) * down + (size - 1) / 2).clamp(0, size - 1)
    left, top = from_x.floor().long(), from_y.floor().long()
    right, bottom = (left + 1).clamp_max(size - 1), (top + 1).clamp_max(size - 1)
    over, below = (from_x - left).unsqueeze(1).to(x.dtype), (from_y - top).unsqueeze(1).to(x.dtype)
    flat = x.reshape(num, channels, size * size)

    def at(row: Tensor, column: Tensor) -> Tensor:
        place = (row * size + column).view(num, 1, -1).expand(-1, channels, -1)
        return flat.gather(2, place).view(num, channels, size, size)

    upper = (1 - over) * at(top, left) + over * at(top, right)
    lower = (1 - over) * at(bottom, left) + over * at(bottom, right)
    rotated = (1 - below) * upper + below * lower
    return torch.where(degrees.view(-1, 1, 1, 1) != 0, rotated, x)
