"""Accuracy computed from class scores."""

from __future__ import annotations

import torch


def top_k_accuracy(score: torch.Tensor, label: torch.Tensor, *, k: int) -> float:
    """Share in [0, 1] of rows whose label is among the k classes with the highest score.

    score: (N, K), any monotone scale; a class with -inf got no support and never counts as a hit. label: (N,) int64; a label >= K is
    a miss. k is capped at K.
    """
    best, column = score.topk(min(k, score.shape[1]), dim=1)
    hit = (column == label[:, None]) & (best > -torch.inf)
    return hit.any(dim=1).double().mean().item()
