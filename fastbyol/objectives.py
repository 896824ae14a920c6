"""What the online network minimises: BYOL's regression and the InfoNCE-beta family around it (Grill et al., equations 2 and 6 to 9)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastbyol.collectives import gathered, summed

NORM_FLOOR = 1e-6
"""The official code divides by sqrt(max(sum of squares, 1e-12)); F.normalize's own default floor is 1e-12 on the norm."""


def l2_normalize(x: Tensor) -> Tensor:
    """Rows of unit length, (N, D); in float32 at least, since bf16 squares lose the small loss near its end."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1, eps=NORM_FLOOR)


def regression_loss(prediction: Tensor, projection: Tensor) -> Tensor:
    """Squared distance of the unit vectors per row, 2 - 2 cos, (N,) in [0, 4] (equation 2)."""
    return (l2_normalize(prediction) - l2_normalize(projection)).square().sum(dim=-1)


def byol_loss(prediction1: Tensor, prediction2: Tensor, projection1: Tensor, projection2: Tensor) -> Tensor:
    """Mean over the batch of the sum of both directions, scalar in [0, 8].

    Args:
        prediction1, prediction2: online predictions of each view, (N, D).
        projection1, projection2: *target* projections of each view, (N, D), without gradient.

    The sum is not halved: halving once cost another library 11 points of accuracy (lightly, pull request 1286).
    """
    return (regression_loss(prediction1, projection2) + regression_loss(prediction2, projection1)).mean()


def infonce_beta_loss(
    prediction1: Tensor, prediction2: Tensor, projection1: Tensor, projection2: Tensor, *, beta: float, alpha: float
) -> Tensor:
    """The negative of the paper's InfoNCE-beta objective, scalar (equations 6 to 9), symmetrised over the views.

    beta = 0 is byol_loss - 4; beta = 1 with predictions = projections = online projections is SimCLR times 2 alpha. Each of this rank's N rows is
    compared with the 2M - 1 others of all ranks, M = N times ranks; gradients reach the rows of other ranks.

    Args:
        beta: weight of the negative term.
        alpha: temperature, > 0.
    """
    keys1, keys2 = all_ranks(l2_normalize(projection1)), all_ranks(l2_normalize(projection2))
    forward = _one_direction(l2_normalize(prediction1), same_view=keys1, other_view=keys2, beta=beta, alpha=alpha)
    backward = _one_direction(l2_normalize(prediction2), same_view=keys2, other_view=keys1, beta=beta, alpha=alpha)
    return -2 * (forward + backward)


def _one_direction(query: Tensor, *, same_view: Tensor, other_view: Tensor, beta: float, alpha: float) -> Tensor:
    own = _first_row_of_rank(len(query)) + torch.arange(len(query), device=query.device)
    across = query @ other_view.T
    positive = across.gather(1, own[:, None]).squeeze(1)
    among = (query @ same_view.T).scatter(1, own[:, None], float("-inf"))
    negative = torch.logsumexp(torch.cat([among, across], dim=1) / alpha, dim=1)
    return (positive - beta * alpha * negative).mean()


def all_ranks(x: Tensor) -> Tensor:
    """(N * ranks, D): the rows of all ranks in rank order, each rank's with its gradient; x itself on one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _GatherRanks.apply(x)  # type: ignore[return-value]


class _GatherRanks(torch.autograd.Function):
    """torch.distributed.nn.functional.all_gather does the same, but torch.compile cannot trace it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gathered(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return summed(gradients[0]).chunk(dist.get_world_size())[dist.get_rank()]


def _first_row_of_rank(num_rows: int) -> int:
    return dist.get_rank() * num_rows if dist.is_initialized() else 0
