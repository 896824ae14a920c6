"""Frozen features of a labelled data set: every image once, in index order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from fastbyol.config.errors import UserError
from fastbyol.data.batch import ImageBatch

PIXEL_SIDE_PX = 32


class Features(NamedTuple):
    """N images as an evaluation protocol sees them, on the CPU.

    feature: (N, D) float32. label: (N,) int64 class, or -1 for none. index: (N,) int64 position in the data set.
    """

    feature: torch.Tensor
    label: torch.Tensor
    index: torch.Tensor

    def labelled(self) -> Features:
        """Returns only the labelled images; the same object if all are labelled."""
        has_label = self.label >= 0
        return self if bool(has_label.all()) else self.rows(has_label)

    def rows(self, chosen: torch.Tensor | slice) -> Features:
        """Returns only these rows: a mask (N,), row numbers, or a slice."""
        return Features(*(part[chosen] for part in self))


@torch.no_grad()
def extract_features(
    encoder: nn.Module, batches: Iterable[ImageBatch], *, device: torch.device | str = "cpu", every_image: bool = True
) -> Features:
    """Returns the frozen encoder's output for every image as float32: eval mode, no gradient, no augmentation.

    The encoder is moved to `device` in channels-last layout; its training mode is restored. `every_image`: the batches must hold each
    image of the set once, in index order. Raises UserError if a feature is not finite.
    """
    was_training = encoder.training
    encoder.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    rows = []
    for batch in batches:
        image = batch.image.to(device=device, memory_format=torch.channels_last)
        # Not the batch itself, which holds its images: all of ImageNet would stay in memory.
        rows.append((encoder(image).float().cpu(), batch.label, batch.index))
    encoder.train(was_training)
    features = _joined(rows, every_image=every_image)
    if not bool(torch.isfinite(features.feature).all()):
        raise UserError("the encoder's features are not finite: the run diverged; take an earlier checkpoint or lower optim.base_lr")
    return features


def pixel_features(batches: Iterable[ImageBatch], *, side_px: int = PIXEL_SIDE_PX) -> Features:
    """Returns the normalised pixels themselves, (N, 3 side side), for a baseline without any network.

    Images larger than `side_px` are averaged down to it first, which limits D to 3,072 whatever the resolution.
    """
    rows = []
    for batch in batches:
        side = min(side_px, batch.image.shape[-1])
        rows.append((F.adaptive_avg_pool2d(batch.image, side).flatten(1), batch.label, batch.index))
    return _joined(rows, every_image=True)


def _joined(rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], *, every_image: bool) -> Features:
    if not rows:
        raise UserError("the data set has no images: nothing to evaluate")
    features = Features(
        feature=torch.cat([feature for feature, _, _ in rows]),
        label=torch.cat([label for _, label, _ in rows]),
        index=torch.cat([index for _, _, index in rows]),
    )
    if every_image and not torch.equal(features.index, torch.arange(len(features.index))):
        raise RuntimeError("an evaluation loader must yield every image exactly once, in index order")
    return features
