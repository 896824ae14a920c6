"""The augmentation after the crop with kornia: its modules one after another on a float batch, as on a GPU.

Same crops, probabilities and magnitudes as ours; kornia draws its own parameters. Differences: torchvision's colour formulas
(brightness and contrast are factors, saturation blends with grey), and the blur reflects at the border. An operation is applied to
those images of the batch that drew it. kornia's own crop is not used: it needs a batch of images of equal size, which files do not
have.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.rivals.packages import import_rival
from fastbyol.config.views import ViewPair, ViewSpec

DIFFERENCES = "torchvision's colour formulas"


def kornia_view(spec: ViewSpec, pair: ViewPair) -> nn.Module:
    """Returns a module (N, 3, S, S) float32 in [0, 1] -> the same shape, normalised. Raises UserError if kornia is not installed."""
    kornia = import_rival("kornia.augmentation")
    threshold = spec.solarize_threshold
    steps = [
        kornia.RandomHorizontalFlip(p=spec.flip_p),
        kornia.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue, p=spec.jitter_p),
        kornia.RandomGrayscale(p=spec.gray_p),
        kornia.RandomGaussianBlur((pair.blur_taps, pair.blur_taps), spec.blur_sigma, p=spec.blur_p),
        kornia.RandomSolarize(thresholds=(threshold, threshold), additions=(0.0, 0.0), p=spec.solarize_p),
        kornia.Normalize(mean=pair.mean, std=pair.std),
    ]
    return nn.Sequential(*steps)


class KorniaViews:
    """Augments both views of a batch from its uint8 crops."""

    def __init__(self, pair: ViewPair) -> None:
        self._views = [kornia_view(spec, pair) for spec in (pair.view1, pair.view2)]

    @torch.no_grad()
    def __call__(self, crops1: Tensor, crops2: Tensor) -> tuple[Tensor, Tensor]:
        """Maps two crops (N, 3, S, S) uint8 to two views in float32, normalised."""
        view1, view2 = (view(crops.to(torch.float32) / 255) for view, crops in zip(self._views, (crops1, crops2), strict=True))
        return view1, view2
