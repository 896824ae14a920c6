"""The batches that the loaders yield to training and evaluation, and their way to the training device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from fastbyol.augment.torch_graph import augment_batch
from fastbyol.config.views import ViewPair


class ViewBatch(NamedTuple):
    """Two views of N images: this rank's share of one micro-batch. The tensors' memory is not reused while they are alive.

    view1, view2: (N, 3, S, S) in channels-last memory format. Either float32, augmented and normalised, or uint8 crops, to be
        augmented on the device by `augment.torch_graph` with `parameters`.
    label: (N,) int64 class of each image. Never seen by the encoder.
    index: (N,) int64 position of each image in the data set.
    parameters: (N, 2, P) float32, augmentation parameters of each view (columns: `augment.parameters.COLUMNS`).
    """

    view1: torch.Tensor
    view2: torch.Tensor
    label: torch.Tensor
    index: torch.Tensor
    parameters: torch.Tensor


class ImageBatch(NamedTuple):
    """N images for evaluation: centre crops, float32, normalised, channels-last; label and index as in `ViewBatch`."""

    image: torch.Tensor
    label: torch.Tensor
    index: torch.Tensor


def views_on_device(
    batch: ViewBatch, views: ViewPair, device: torch.device, *, compiled: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (view1, view2, label) on the device, views normalised (N, 3, S, S) channels-last; copies do not block the host.

    We have not run this on a GPU yet. uint8 crops go through `augment.torch_graph`, which is tested against the reference on the CPU.

    Args:
        compiled: compile the augmentation with Inductor, one graph per view: a few passes over the batch in memory instead of about 300.
    """
    label = batch.label.to(device, non_blocking=True)
    if batch.view1.dtype != torch.uint8:
        return batch.view1.to(device, non_blocking=True), batch.view2.to(device, non_blocking=True), label
    parameters = batch.parameters.to(device, non_blocking=True)
    rotate = max(views.view1.rotation_deg, views.view2.rotation_deg) > 0
    augment = _compiled_augment() if compiled else augment_batch
    view1, view2 = (
        augment(
            crops.to(device, non_blocking=True),
            parameters[:, v],
            blur_taps=views.blur_taps,
            mean=views.mean,
            std=views.std,
            rotate=rotate,
            semantics=views.semantics,
        )
        for v, crops in enumerate((batch.view1, batch.view2))
    )
    return view1, view2, label


@cache
def _compiled_augment() -> Callable[..., torch.Tensor]:
    return torch.compile(augment_batch, dynamic=False, fullgraph=True)
