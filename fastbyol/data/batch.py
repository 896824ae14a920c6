"""What a loader hands to the training step."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ViewBatch(NamedTuple):
    """Two views of each of N images; this rank's share of one global batch. Every tensor is the batch's own memory: keep it as long as you like.

    view1, view2: (N, 3, S, S) in channels-last memory format. From a CPU executor float32, normalised; otherwise uint8 crops, to be
        augmented on the device by `augment.torch_graph` with `parameters`.
    label: (N,) int64 class of each image. Never seen by the encoder.
    index: (N,) int64 position of each image in the data set.
    parameters: (N, 2, P) float32, what each view drew (columns: `augment.parameters.COLUMNS`).
    """

    view1: torch.Tensor
    view2: torch.Tensor
    label: torch.Tensor
    index: torch.Tensor
    parameters: torch.Tensor


class ImageBatch(NamedTuple):
    """N images as the evaluation sees them (centre crop, normalised float32 channels-last), with label and index as in `ViewBatch`."""

    image: torch.Tensor
    label: torch.Tensor
    index: torch.Tensor
