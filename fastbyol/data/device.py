"""Last stage of the data path: moves a batch to the training device, and augments it there if the loader only made crops."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fastbyol.augment.torch_graph import augment_batch
from fastbyol.config.views import ViewPair
from fastbyol.data.batch import ViewBatch


def views_on_device(batch: ViewBatch, views: ViewPair, device: torch.device, *, compiled: bool = False) -> tuple[Tensor, Tensor, Tensor]:
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
def _compiled_augment() -> Callable[..., Tensor]:
    return torch.compile(augment_batch, dynamic=False, fullgraph=True)
