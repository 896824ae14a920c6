"""The augmentation as one simple function per operation, slow and for any float type: what the fast executors are tested against.

Images are (N, 3, H, W) tensors in [0, 1]; parameters are (N,) tensors or plain numbers. No operation clips unless its own formula
does: `render_view` clips where the paper's code does. Source: Grill et al., appendix B;
deepmind-research/byol/utils/augmentations.py. The functions named torchvision_* use torchvision's formulas instead
(`config.views.SEMANTICS`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.augment import parameters as columns
from fastbyol.config.errors import require, require_choice
from fastbyol.config.views import ViewPair

LUMA = (0.2989, 0.5870, 0.1140)
"""TensorFlow's weights for grey; they sum to 0.9999."""

Number = Tensor | float


def _per_image(x: Tensor, value: Number) -> Tensor:
    """Reshapes a parameter to (N, 1, 1, 1), or leaves a scalar, in the dtype of x."""
    value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    return value.reshape(-1, 1, 1, 1) if value.ndim else value


def adjust_brightness(x: Tensor, delta: Number) -> Tensor:
    """Returns x + delta: additive, unlike torchvision's."""
    return x + _per_image(x, delta)


def adjust_contrast(x: Tensor, factor: Number) -> Tensor:
    """Returns factor (x - mean) + mean, with the mean of each channel over the image (torchvision: of the grey image)."""
    mean = x.mean(dim=(2, 3), keepdim=True)
    return _per_image(x, factor) * (x - mean) + mean


def rgb_to_hsv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns hue in [0, 1), 0 for grey, saturation and value, each (N, 1, H, W), as TensorFlow does."""
    # The largest channel determines the sextant of the hue; ties go to R, G, B in this order.
    red, green, blue = x.split(1, dim=1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    saturation = torch.where(value > 0, chroma / torch.where(value > 0, value, 1), 0)
    safe = torch.where(chroma > 0, chroma, 1)
    sextants = torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    sextants = torch.where(value == red, (green - blue) / safe, sextants)
    return torch.where(chroma > 0, sextants / 6 % 1.0, 0), saturation, value


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Returns (N, 3, H, W) from hue (taken modulo 1), saturation and value, each (N, 1, H, W)."""
    chroma = saturation * value
    sextants = 6 * (hue % 1.0)
    middle = chroma * (1 - (sextants % 2 - 1).abs())
    zero = torch.zeros_like(chroma)
    channels_of_sextant = [
        (chroma, middle, zero),
        (middle, chroma, zero),
        (zero, chroma, middle),
        (zero, middle, chroma),
        (middle, zero, chroma),
        (chroma, zero, middle),
    ]
    rgb = torch.cat([zero] * 3, 1)
    for sextant, channels in enumerate(channels_of_sextant):
        rgb = torch.where(sextants.floor() % 6 == sextant, torch.cat(channels, 1), rgb)
    return rgb + value - chroma


def adjust_saturation(x: Tensor, factor: Number) -> Tensor:
    """Multiplies HSV saturation by factor and clips it to [0, 1] (torchvision blends with grey)."""
    hue, saturation, value = rgb_to_hsv(x)
    return hsv_to_rgb(hue, (saturation * _per_image(x, factor)).clamp(0, 1), value)


def adjust_hue(x: Tensor, delta: Number) -> Tensor:
    """Adds delta turns to the HSV hue."""
    hue, saturation, value = rgb_to_hsv(x)
    return hsv_to_rgb(hue + _per_image(x, delta), saturation, value)


def torchvision_brightness(x: Tensor, factor: Number) -> Tensor:
    """Returns factor x."""
    return x * _per_image(x, factor)


def torchvision_contrast(x: Tensor, factor: Number) -> Tensor:
    """Returns factor (x - mean) + mean, with the mean of the grey image."""
    mean = to_grayscale(x).mean(dim=(1, 2, 3), keepdim=True)
    return _per_image(x, factor) * (x - mean) + mean


def torchvision_saturation(x: Tensor, factor: Number) -> Tensor:
    """Returns factor x + (1 - factor) grey."""
    grey = to_grayscale(x)
    return _per_image(x, factor) * (x - grey) + grey


def to_grayscale(x: Tensor) -> Tensor:
    """Returns 0.2989 R + 0.5870 G + 0.1140 B in all three channels."""
    weight = torch.tensor(LUMA, dtype=x.dtype, device=x.device).reshape(1, 3, 1, 1)
    return (x * weight).sum(1, keepdim=True).expand(-1, 3, -1, -1)


def gaussian_blur(x: Tensor, sigma: Number, taps: int, *, padding: str = "constant") -> Tensor:
    """Blurs with a separable Gaussian of an odd number of taps; sigma (pixels) > 0.

    padding: 'constant' pads with zeros, so borders darken (the paper); 'reflect' (torchvision) needs taps < 2 min(H, W).
    """
    require(taps >= 1 and taps % 2 == 1, "taps", taps, "an odd number >= 1")
    radius = taps // 2
    sigmas = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
    place = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    blurred = []
    for image, one_sigma in zip(x, sigmas, strict=True):
        window = torch.exp(-(place**2) / (2 * one_sigma**2))
        window = window / window.sum()
        channels = F.pad(image.unsqueeze(1), [radius] * 4, mode=padding)
        channels = F.conv2d(channels, window.reshape(1, 1, 1, -1))
        channels = F.conv2d(channels, window.reshape(1, 1, -1, 1))
        blurred.append(channels.squeeze(1))
    return torch.stack(blurred)


def solarize(x: Tensor, threshold: Number) -> Tensor:
    """Returns x below the threshold and 1 - x from it upwards."""
    return torch.where(x < _per_image(x, threshold), x, 1 - x)


def normalize(x: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Returns (x - mean) / std for each channel."""
    shape, like = (1, 3, 1, 1), {"dtype": x.dtype, "device": x.device}
    return (x - torch.tensor(mean, **like).reshape(shape)) / torch.tensor(std, **like).reshape(shape)


def rotate(x: Tensor, degrees: Number) -> Tensor:
    """Rotates counter-clockwise about the centre of the image (square or not): bilinear, edge pixels repeated.

    Differs from the paper, which does not rotate. An option for data sets of small images.
    """
    num, _, height, width = x.shape
    angle = torch.deg2rad(torch.as_tensor(degrees, dtype=x.dtype, device=x.device).expand(num)).reshape(-1, 1, 1)
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    y = torch.arange(height, dtype=x.dtype, device=x.device).reshape(1, -1, 1) - centre_y
    x_axis = torch.arange(width, dtype=x.dtype, device=x.device).reshape(1, 1, -1) - centre_x
    from_x = (centre_x + torch.cos(angle) * x_axis - torch.sin(angle) * y).clamp(0, width - 1)
    from_y = (centre_y + torch.sin(angle) * x_axis + torch.cos(angle) * y).clamp(0, height - 1)
    left, top = from_x.floor().long(), from_y.floor().long()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    over, down = (from_x - left).unsqueeze(1), (from_y - top).unsqueeze(1)
    image = torch.arange(num, device=x.device).reshape(-1, 1, 1)
    pixels = x.permute(0, 2, 3, 1)

    def at(row: Tensor, column: Tensor) -> Tensor:
        return pixels[image, row, column].permute(0, 3, 1, 2)

    upper = (1 - over) * at(top, left) + over * at(top, right)
    lower = (1 - over) * at(bottom, left) + over * at(bottom, right)
    return (1 - down) * upper + down * lower


def resize_matrix(n_in: int, n_out: int, *, interpolation: str, antialias: bool) -> NDArray[np.float64]:
    """Returns (n_out, n_in) weights: half-pixel centres, Keys cubic (a = -0.5) or triangle; taps outside are dropped, the rest sum to 1."""
    require_choice("interpolation", interpolation, ("bicubic", "bilinear"))
    scale = n_in / n_out
    stretch = max(scale, 1.0) if antialias else 1.0
    matrix = np.zeros((n_out, n_in))
    for o in range(n_out):
        centre = (o + 0.5) * scale
        for i in range(n_in):
            matrix[o, i] = _filter(abs(i + 0.5 - centre) / stretch, interpolation)
    return matrix / matrix.sum(axis=1, keepdims=True)


def _filter(distance: float, interpolation: str) -> float:
    if interpolation == "bilinear":
        return max(1 - distance, 0.0)
    if distance < 1:
        return 1.5 * distance**3 - 2.5 * distance**2 + 1
    return -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2 if distance < 2 else 0.0


def crop_resize(image: Tensor, box: tuple[int, int, int, int], size_px: int, interpolation: str, antialias: bool) -> Tensor:
    """Crops the box (y, x, h, w) of an (H, W, 3) uint8 image and resizes it as tf.image.resize does: (3, S, S) float64 in [0, 1]."""
    y, x, h, w = box
    crop = image[y : y + h, x : x + w].to(torch.float64) / 255
    down = torch.from_numpy(resize_matrix(h, size_px, interpolation=interpolation, antialias=antialias))
    across = torch.from_numpy(resize_matrix(w, size_px, interpolation=interpolation, antialias=antialias))
    # The cubic overshoots at edges; the official code clips here, before the first random operation.
    return torch.einsum("oh,hwc,pw->cop", down, crop, across).clamp(0, 1)


def jitter_order(code: float) -> list[int]:
    """Returns the four operations of an order code in order: 0 brightness, 1 contrast, 2 saturation, 3 hue; an empty list for -1."""
    return [] if code < 0 else [int(code) // 4**place % 4 for place in (3, 2, 1, 0)]


def render_view(image: Tensor, parameters_row: Tensor | NDArray[np.float32], pair: ViewPair) -> Tensor:
    """Applies the whole augmentation of one parameter row to an (H, W, 3) uint8 image: (3, S, S) float64, normalised."""
    row = [float(value) for value in parameters_row]
    y, x, h, w = (int(row[column]) for column in (columns.CROP_Y, columns.CROP_X, columns.CROP_H, columns.CROP_W))
    view = crop_resize(image, (y, x, h, w), pair.size_px, pair.interpolation, pair.antialias).unsqueeze(0)
    return augment_view(view, row, blur_taps=pair.blur_taps, mean=pair.mean, std=pair.std, semantics=pair.semantics)[0]


JITTER: dict[str, tuple[Callable[[Tensor, Number], Tensor], ...]] = {
    "paper": (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue),
    "torchvision": (torchvision_brightness, torchvision_contrast, torchvision_saturation, adjust_hue),
}
"""Function of each digit of an order code, per semantics. Hue is the same in both."""
BLUR_PADDING = {"paper": "constant", "torchvision": "reflect"}


def augment_view(
    view: Tensor,
    row: list[float],
    *,
    blur_taps: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    semantics: str = "paper",
) -> Tensor:
    """Applies everything after crop and resize to one view in [0, 1]: (1, 3, S, S), normalised."""
    # In the order of appendix B; each operation of the jitter clips, as in the official code.
    if row[columns.FLIP] > 0:
        view = view.flip(3)
    if row[columns.ROTATION_DEG] != 0:
        view = rotate(view, row[columns.ROTATION_DEG])
    amounts = (columns.BRIGHTNESS, columns.CONTRAST, columns.SATURATION, columns.HUE)
    for op in jitter_order(row[columns.ORDER]):
        view = JITTER[semantics][op](view, row[amounts[op]]).clamp(0, 1)
    if row[columns.GRAY] > 0:
        view = to_grayscale(view)
    view = view.clamp(0, 1)
    if row[columns.SIGMA] > 0:
        view = gaussian_blur(view, row[columns.SIGMA], blur_taps, padding=BLUR_PADDING[semantics])
    view = solarize(view, row[columns.SOLARIZE]).clamp(0, 1)
    return normalize(view, mean, std)
