"""Images for the report and the contact sheet: the views that the loader draws, and images with similar features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from fastbyol.config.views import ViewPair
from fastbyol.data.loader import TwoViewLoader
from fastbyol.evaluation.features import Features
from fastbyol.evaluation.knn import nearest

THUMBNAIL_PX = 96
"""Side above which an image is made smaller for a page: it is shown at 76 px."""


class Neighbours(NamedTuple):
    """Q queries and their k nearest training images: positions in val (Q,) and in train (Q, k), cosine similarity (Q, k).

    Without val images the queries are training images, too, and are not their own neighbours.
    """

    query: torch.Tensor
    neighbour: torch.Tensor
    similarity: torch.Tensor


def nearest_neighbours(train: Features, val: Features, *, queries: int, k: int, seed: int = 0) -> Neighbours:
    """Returns the nearest training images of `queries` random val images that cover as many classes as possible. Seeded.

    val: may be empty; the queries are then training images.
    """
    own = not len(val.label)
    asked = train if own else val
    query = _one_of_each_class(asked.label, count=queries, seed=seed)
    similarity, position = nearest(train.feature, asked.feature[query], k=min(k + own, len(train.label)))
    if own:
        others = position != query[:, None]
        others[others.all(dim=1), -1] = False  # an equal image stood in the query's place
        similarity, position = (part[others].view(len(query), -1) for part in (similarity, position))
    return Neighbours(query=query, neighbour=position, similarity=similarity)


def _one_of_each_class(label: torch.Tensor, *, count: int, seed: int) -> torch.Tensor:
    """Returns up to `count` positions sorted by class: first a random one of each class, then random others."""
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(seed))
    taken: dict[int, int] = {}
    for position in order.tolist():
        taken.setdefault(int(label[position]), position)
    first = list(taken.values())[:count]
    others = [p for p in order.tolist() if p not in set(first)]
    chosen = first + others[: count - len(first)]
    return torch.tensor(sorted(chosen, key=lambda p: int(label[p])))


def display_pixels(images: torch.Tensor, *, views: ViewPair) -> np.ndarray:
    """Converts normalised images (N, 3, S, S) to (N, S, S, 3) uint8 for display."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (views.mean, views.std))
    pixels = (images.float().cpu() * std + mean).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def thumbnails(images: torch.Tensor, *, views: ViewPair) -> np.ndarray:
    """Returns normalised images (N, 3, S, S) as (N, T, T, 3) uint8 for a page, averaged down to at most THUMBNAIL_PX."""
    if images.shape[-1] > THUMBNAIL_PX:
        images = F.adaptive_avg_pool2d(images.float(), THUMBNAIL_PX)
    return display_pixels(images, views=views)


def draw_views(loader: TwoViewLoader, *, index: Sequence[int], epochs: int) -> torch.Tensor:
    """Returns (N, 2 epochs, 3, S, S) normalised: view 1 and view 2 of these images in epochs 0, 1, …, as the loader draws them."""
    return draw_parameters_and_views(loader, index=index, epochs=epochs)[1]


def draw_parameters_and_views(loader: TwoViewLoader, *, index: Sequence[int], epochs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the parameters of the views of `draw_views`, (N, 2 epochs, P) (columns: `augment.parameters.COLUMNS`), and the views."""
    batches = [batch for epoch in range(epochs) for batch in loader.views_of(index, epoch=epoch, batch=len(index))]
    drawn = torch.stack([view for batch in batches for view in (batch.view1, batch.view2)], dim=1)
    return torch.cat([batch.parameters for batch in batches], dim=1), drawn
