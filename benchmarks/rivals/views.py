"""BYOL's views by other libraries.

torchvision, as in most repositories: its transforms on Pillow images, one after another. Same images, crop areas, probabilities and
magnitudes as ours. Differences, as in those repositories: torchvision's colour operations blend (the paper's shift, scale relative to
the channel's mean, and scale HSV saturation), the blur is Pillow's (box filters), the crop rejects boxes that leave the image, and the
bicubic resize is antialiased.

lightly: its BYOLTransform in a torch DataLoader over an ImageFolder. Its defaults have the paper's probabilities and magnitudes.
Differences, all of which favour lightly or do not affect the time: the resize is bilinear (antialiased), colour operations and blur are
Pillow's.

kornia: its modules one after another on a float batch of crops, as on a GPU. Same crops, probabilities and magnitudes as ours; kornia
draws its own parameters. Differences: torchvision's colour formulas (brightness and contrast are factors, saturation blends with grey),
and the blur reflects at the border. An operation is applied to those images of the batch that drew it. kornia's own crop is not used: it
needs a batch of images of equal size, which files do not have.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.rivals import import_rival
from fastbyol.config.views import ViewPair, ViewSpec
from fastbyol.data.batch import ViewBatch
from fastbyol.data.inputs.folder import list_image_folder

KORNIA_DIFFERENCES = "torchvision's colour formulas"


class PillowBlur:
    """Gaussian blur of a random sigma, as in code derived from SimCLR and MoCo."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


def torchvision_view(spec: ViewSpec, pair: ViewPair) -> transforms.Compose:
    """Returns the transform of one view: PIL image -> (3, S, S) float32, normalised."""
    interpolation = transforms.InterpolationMode(pair.interpolation)
    jitter = transforms.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    steps = [
        transforms.RandomResizedCrop(pair.size_px, scale=spec.crop_area, ratio=spec.crop_aspect, interpolation=interpolation),
        transforms.RandomHorizontalFlip(spec.flip_p),
        *([transforms.RandomRotation(spec.rotation_deg, transforms.InterpolationMode.BILINEAR)] if spec.rotation_deg else []),
        transforms.RandomApply([jitter], p=spec.jitter_p),
        transforms.RandomGrayscale(spec.gray_p),
        transforms.RandomApply([PillowBlur(spec.blur_sigma)], p=spec.blur_p),
        transforms.RandomSolarize(threshold=round(255 * spec.solarize_threshold), p=spec.solarize_p),
        transforms.ToTensor(),
        transforms.Normalize(pair.mean, pair.std),
    ]
    return transforms.Compose(steps)


class TorchvisionLoader:
    """Batches of an ImageFolder in listing order, made in the calling thread; iterating yields `ViewBatch` (parameters empty)."""

    def __init__(self, folder: Path, pair: ViewPair, *, batch: int) -> None:
        self._listing = list_image_folder(folder)
        self._views = [torchvision_view(spec, pair) for spec in (pair.view1, pair.view2)]
        self._batch = batch

    def __iter__(self) -> Iterator[ViewBatch]:
        for first in range(0, len(self._listing.files) - self._batch + 1, self._batch):
            yield self._collate(range(first, first + self._batch))

    def _collate(self, indices: range) -> ViewBatch:
        pairs = [self._load(index) for index in indices]
        view1, view2 = (torch.stack(views).contiguous(memory_format=torch.channels_last) for views in zip(*pairs, strict=True))
        label = torch.tensor([self._listing.labels[index] for index in indices])
        return ViewBatch(view1, view2, label, torch.tensor(list(indices)), torch.empty(len(indices), 2, 0))

    def _load(self, index: int) -> list[Tensor]:
        with Image.open(str(self._listing.path(index))) as file:
            image = file.convert("RGB")
        return [cast(Tensor, view(image)) for view in self._views]


class LightlyLoader:
    """Batches of an ImageFolder in listing order, made in the calling thread; iterating yields ([view1, view2], label)."""

    def __init__(self, folder: Path, *, size_px: int, batch: int) -> None:
        byol = import_rival("lightly.transforms.byol_transform")
        transform = byol.BYOLTransform(byol.BYOLView1Transform(input_size=size_px), byol.BYOLView2Transform(input_size=size_px))
        # Without workers, as ours has one thread: the CPU clock sees the time of another process only when it has ended.
        self._loader: DataLoader[Any] = DataLoader(ImageFolder(str(folder), transform), batch_size=batch, drop_last=True)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)


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
