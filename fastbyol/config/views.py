"""The augmentation of each view as data: the paper's augmentation table and its ablations.

One `ViewPair` configures every backend and every executor. Source of all numbers: Grill et al., table 6 and appendix B, and the
official code (deepmind-research/byol/utils/augmentations.py, dataset.py); `ABLATIONS` is table 17. `TORCHVISION` has the paper's
probabilities and magnitudes with torchvision's formulas, for comparison with code built on those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from fastbyol.config.errors import require, require_choice, require_probability, require_range

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SEMANTICS = ("paper", "torchvision")
"""Formulas that the numbers of a `ViewSpec` go into.

torchvision differs from the paper as follows. Brightness is a factor in [1 - brightness, 1 + brightness]. Contrast is relative to the
mean of the grey image, not of each channel. Saturation blends with grey instead of scaling HSV saturation. Blur reflects at the
border instead of padding with zeros. A crop that does not fit is drawn again up to ten times and then replaced by a central one,
instead of being clamped.
Source: torchvision 0.29, transforms/v2/_geometry.py, functional/_color.py, functional/_misc.py.
"""
MAX_SIZE_PX = 4096
TINY = 1e-6


@dataclass(frozen=True)
class ViewSpec:
    """The augmentation of one view. Probabilities are in [0, 1]; magnitudes are in units of the [0, 1] pixel range.

    Order: clamped random crop, resize, flip, (rotation), colour jitter in random order, grayscale, blur, solarize, normalise.
    """

    crop_area: tuple[float, float] = (0.08, 1.0)
    """Crop area as a share of the image's area, drawn uniformly."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop, drawn log-uniformly."""
    flip_p: float = 0.5
    """Probability of a horizontal flip."""
    rotation_deg: float = 0.0
    """Largest rotation in either direction, in degrees. Differs from the paper, which has no rotation (0)."""
    jitter_p: float = 0.8
    """Probability of colour jitter: one draw for its four operations together."""
    brightness: float = 0.4
    """x + d with d in [-brightness, brightness] (formulas here and below are the paper's, see `SEMANTICS`)."""
    contrast: float = 0.4
    """f (x - mean) + mean with the mean of each channel and f in [1 - contrast, 1 + contrast]."""
    saturation: float = 0.2
    """HSV saturation times f, with f in [1 - saturation, 1 + saturation]."""
    hue: float = 0.1
    """HSV hue plus d turns, with d in [-hue, hue]."""
    gray_p: float = 0.2
    """Probability of grayscale."""
    blur_p: float = 1.0
    """Probability of the Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation in pixels of the view, whatever its size."""
    solarize_p: float = 0.0
    """Probability of solarization."""
    solarize_threshold: float = 0.5
    """Solarization inverts values of at least this, in [0, 1]."""

    def __post_init__(self) -> None:
        require_range("crop_area", self.crop_area, TINY, 1.0)
        require_range("crop_aspect", self.crop_aspect, 0.01, 100.0)
        require(0.0 <= self.rotation_deg <= 180.0, "rotation_deg", self.rotation_deg, "degrees in [0, 180]")
        for name in ("flip_p", "jitter_p", "gray_p", "blur_p", "solarize_p"):
            require_probability(name, getattr(self, name))
        for name in ("brightness", "contrast", "saturation", "solarize_threshold"):
            require_probability(name, getattr(self, name))
        require(0.0 <= self.hue <= 0.5, "hue", self.hue, "turns in [0, 0.5]")
        require_range("blur_sigma", self.blur_sigma, TINY, 100.0)


@dataclass(frozen=True)
class ViewPair:
    """The augmentation of a run: both views and the settings they share."""

    view1: ViewSpec = field(default_factory=ViewSpec)
    view2: ViewSpec = field(default_factory=lambda: ViewSpec(blur_p=0.1, solarize_p=0.2))
    size_px: int = 224
    """Height and width of a view in pixels."""
    semantics: str = "paper"
    """paper; torchvision: the formulas for colour jitter, blur border and crop that most PyTorch code uses."""
    interpolation: str = "bicubic"
    """bicubic (Keys, a = -0.5) or bilinear: half-pixel centres; taps outside the crop are dropped and the rest renormalised, as in
    tf.image.resize.
    """
    antialias: bool = False
    """Widen the filter where a crop is shrunk, as Pillow does; tf.image.resize does not, and so neither does the paper."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel, subtracted from the view's values in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel, by which the difference is divided."""

    def __post_init__(self) -> None:
        require(1 <= self.size_px <= MAX_SIZE_PX, "size_px", self.size_px, f"pixels in [1, {MAX_SIZE_PX}]")
        require_choice("semantics", self.semantics, SEMANTICS)
        require_choice("interpolation", self.interpolation, ("bicubic", "bilinear"))
        require(all(math.isfinite(m) for m in self.mean), "mean", self.mean, "three finite numbers")
        require(all(math.isfinite(s) and s > 0 for s in self.std), "std", self.std, "three positive numbers")

    @property
    def blur_taps(self) -> int:
        """Taps of the Gaussian window: 2 int(size / 10 / 2) + 1, that is 23 at 224 px."""
        return blur_taps(self.size_px)


def blur_taps(size_px: int) -> int:
    """Number of taps of the paper's blur for a view of this size: kernel size/10, radius int(kernel/2)."""
    return 2 * int(size_px / 10 / 2) + 1


def both(pair: ViewPair, **changes: object) -> ViewPair:
    """Returns the pair with the same changes made to both views."""
    return replace(pair, view1=replace(pair.view1, **changes), view2=replace(pair.view2, **changes))  # type: ignore[arg-type]


PAPER = ViewPair()
TORCHVISION = replace(PAPER, semantics="torchvision", antialias=True)
"""Antialiased, which is RandomResizedCrop's default and always the case for Pillow images."""
_CROP_ONLY = both(PAPER, flip_p=0.0, jitter_p=0.0, gray_p=0.0, blur_p=0.0, solarize_p=0.0)


def _only(*kept: str) -> ViewPair:
    """Returns the crop-only pair with the named probabilities at their paper value for each view."""
    views = {name: replace(getattr(_CROP_ONLY, name), **{p: getattr(getattr(PAPER, name), p) for p in kept}) for name in ("view1", "view2")}
    return replace(_CROP_ONLY, **views)  # type: ignore[arg-type]


ABLATIONS: dict[str, ViewPair] = {
    "no_flip": both(PAPER, flip_p=0.0),
    "no_blur": both(PAPER, blur_p=0.0),
    "no_colour": both(PAPER, jitter_p=0.0, gray_p=0.0),
    "no_jitter": both(PAPER, jitter_p=0.0),
    "no_grayscale": both(PAPER, gray_p=0.0),
    "no_blur_in_view2": replace(PAPER, view2=replace(PAPER.view2, blur_p=0.0)),
    "no_solarize_in_view2": replace(PAPER, view2=replace(PAPER.view2, solarize_p=0.0)),
    "neither_in_view2": replace(PAPER, view2=replace(PAPER.view2, blur_p=0.0, solarize_p=0.0)),
    "symmetric": both(PAPER, blur_p=0.5, solarize_p=0.2),
    "crop_only": _CROP_ONLY,
    "crop_flip": _only("flip_p"),
    "crop_colour": _only("jitter_p", "gray_p"),
    "crop_blur": _only("blur_p"),
}
