"""The batches that the loaders yield to training and evaluation."""

from __future__ import annotations

from typing import NamedTuple

import torch


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
