"""BYOL's views as in most repositories: torchvision.transforms on Pillow images, one after another.

Same images, crop areas, probabilities and magnitudes as ours. Differences, as in those repositories: torchvision's colour operations
blend (the paper's shift, scale relative to the channel's mean, and scale HSV saturation), the blur is Pillow's (box filters), the
crop rejects boxes that leave the image, and the bicubic resize is antialiased.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from fastbyol.config.views import ViewPair, ViewSpec
from fastbyol.data.batch import ViewBatch
from fastbyol.data.inputs.folder import list_image_folder


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

    def _load(self, index: int) -> list[torch.Tensor]:
        with Image.open(self._listing.path(index)) as file:
            image = file.convert("RGB")
        return [cast(torch.Tensor, view(image)) for view in self._views]
