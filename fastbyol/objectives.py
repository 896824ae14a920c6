"""What the online network minimises: BYOL's regression and the InfoNCE-beta family around it (Grill et al., equations 2 and 6 to 9)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """The negative of the paper's InfoNCE-beta objective, scalar (equations 6 to 9).

    beta = 0 is byol_loss - 4; beta = 1 with predictions = projections = online projections is SimCLR times 2 alpha. Symmetrised over the views.
    Each row is compared with the 2N - 1 others of this batch.

    Args:
        beta: weight of the negative term.
        alpha: temperature, > 0.
    """
    forward = _one_direction(l2_normalize(prediction1), l2_normalize(projection1), l2_normalize(projection2), beta=beta, alpha=alpha)
    backward = _one_direction(l2_normalize(prediction2), l2_normalize(projection2), l2_normalize(projection1), beta=beta, alpha=alpha)
    return -2 * (forward + backward)


def _one_direction(query: Tensor, same_view: Tensor, other_view: Tensor, *, beta: float, alpha: float) -> Tensor:
    positive = (query * other_view).sum(dim=-1)
    if beta == 0:
        return positive.mean()
    among = query @ same_view.T / alpha
    among = among.masked_fill(torch.eye(len(query), dtype=torch.bool, device=query.device), float("-inf"))
    negative = torch.logsumexp(torch.cat([among, query @ other_view.T / alpha], dim=1), dim=1)
    return (positive - beta * alpha * negative).mean()
