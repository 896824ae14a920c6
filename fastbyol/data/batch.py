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


class CropBatch(NamedTuple):
    """One view of N images for training with labels; image: float32 views or uint8 crops as in `ViewBatch`, parameters: (N, P)."""

    image: torch.Tensor
    label: torch.Tensor
    index: torch.Tensor
    parameters: torch.Tensor


def views_on_device(
    batch: ViewBatch, views: ViewPair, device: torch.device, *, dtype: torch.dtype = torch.float32, compiled: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the normalised views as one batch (2N, 3, S, S), view 1 first, and the labels (N,), on the device.

    Copies do not block the host. We have not run this on a GPU yet. uint8 crops go through `augment.torch_graph`, which is tested against
    the reference on the CPU.

    Args:
        dtype: number format of the views: that of the network's first layer, which would convert them at the cost of another pass.
        compiled: compile the augmentation with Inductor: a few passes over the batch in memory instead of about 300.
    """
    label = batch.label.to(device, non_blocking=True)
    if batch.view1.dtype != torch.uint8:
        return _one_batch(batch.view1, batch.view2, device, dtype), label
    parameters = batch.parameters.to(device, non_blocking=True).transpose(0, 1).flatten(0, 1)
    both = _one_batch(batch.view1, batch.view2, device, torch.uint8)
    return _augmented(both, parameters, views, dtype=dtype, compiled=compiled), label


def crops_on_device(
    batch: CropBatch, views: ViewPair, device: torch.device, *, dtype: torch.dtype = torch.float32, compiled: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the normalised views (N, 3, S, S) and the labels (N,) on the device, as `views_on_device` does for two views."""
    image, label = batch.image.to(device, non_blocking=True), batch.label.to(device, non_blocking=True)
    if image.dtype != torch.uint8:
        return image.to(dtype), label
    return _augmented(image, batch.parameters.to(device, non_blocking=True), views, dtype=dtype, compiled=compiled), label


def _augmented(crops: torch.Tensor, parameters: torch.Tensor, views: ViewPair, *, dtype: torch.dtype, compiled: bool) -> torch.Tensor:
    augment = _compiled_augment() if compiled else augment_batch
    return augment(
        crops,
        parameters,
        blur_taps=views.blur_taps,
        mean=views.mean,
        std=views.std,
        dtype=dtype,
        rotate=max(views.view1.rotation_deg, views.view2.rotation_deg) > 0,
        semantics=views.semantics,
    )


def _one_batch(view1: torch.Tensor, view2: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Returns both views one after the other, in the memory layout of view 1, each written to its place by its only copy."""
    layout = torch.channels_last if view1.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    both = torch.empty((2 * len(view1), *view1.shape[1:]), dtype=dtype, device=device, memory_format=layout)
    for place, view in zip(both.chunk(2), (view1, view2), strict=True):
        # A copy to a GPU that also converts would do so on the host, into memory that is not pinned, and block.
        place.copy_(view if view.dtype == dtype else view.to(device, non_blocking=True), non_blocking=True)
    return both


@cache
def _compiled_augment() -> Callable[..., torch.Tensor]:
    return torch.compile(augment_batch, dynamic=False, fullgraph=True)
