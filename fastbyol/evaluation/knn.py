"""Weighted k-nearest-neighbour classification by cosine similarity: the protocol of InstDisc (Wu et al. 2018) and DINO."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastbyol.config.errors import UserError, require_at_least, require_positive
from fastbyol.evaluation.features import Features

DEFAULT_K = 20
DEFAULT_TEMPERATURE = 0.07
SIMILARITIES_AT_ONCE = 2**26
"""Entries of the similarity matrix computed at once: 256 MiB."""


def nearest(train: torch.Tensor, val: torch.Tensor, *, k: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosine similarity (N, k), descending, and row in `train` (N, k) of each val feature's k nearest train features. Exact, in
    chunks.

    Raises UserError if k is not in 1..len(train).
    """
    require_at_least("k", k, 1)
    if k > len(train):
        raise UserError(f"k = {k}: the training set has only {len(train)} images; pass a k of at most {len(train)}")
    keys = F.normalize(train.to(device), dim=1)
    similarity, position = [], []
    for queries in val.split(max(1, SIMILARITIES_AT_ONCE // len(train))):
        top = (F.normalize(queries.to(device), dim=1) @ keys.T).topk(k, dim=1)
        similarity.append(top.values.cpu())
        position.append(top.indices.cpu())
    return torch.cat(similarity), torch.cat(position)


def knn_predict(
    train: Features,
    val: torch.Tensor,
    *,
    num_classes: int,
    k: int = DEFAULT_K,
    temperature: float = DEFAULT_TEMPERATURE,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Returns class scores (N, num_classes) of N val features: the log of the neighbours' votes, each weighted exp(similarity /
    temperature).

    A class without a neighbour scores -inf. k = 20 and temperature 0.07 are DINO's defaults. Raises UserError if k > len(train.label).
    """
    require_positive("temperature", temperature)
    similarity, position = nearest(train.feature, val, k=k, device=device)
    # Relative to the nearest neighbour: classes rank the same, and exp cannot overflow at a small temperature.
    weight = ((similarity - similarity[:, :1]).double() / temperature).exp()
    votes = torch.zeros(len(val), num_classes, dtype=torch.float64)
    return votes.scatter_add_(1, train.label[position], weight).log()
