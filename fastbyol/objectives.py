"""Loss functions: BYOL's regression and the InfoNCE-beta family around it (Grill et al., equations 2 and 6 to 9).

Also the alternatives that the paper tries: other normalisations in the loss (appendix F.6), a predictor in closed form (appendix I.2).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastbyol.ranks.collectives import gathered, summed

NORM_FLOOR = 1e-6
"""The official code divides by sqrt(max(sum of squares, 1e-12)); F.normalize's own default floor is 1e-12 on the norm."""
NORMALIZATION_EPS = 1e-5
"""Added to the variance that layer and batch normalisation of the loss divide by, as everywhere in the official networks."""


def at_least_float32(x: Tensor) -> Tensor:
    """Returns x unchanged if it is float64, else x in float32."""
    return x if x.dtype == torch.float64 else x.float()


def l2_normalize(x: Tensor) -> Tensor:
    """Scales each row of x (N, D) to unit length, in float32 at least: bf16 is too coarse for the small loss late in training."""
    return F.normalize(at_least_float32(x), dim=-1, eps=NORM_FLOOR)


def layer_normalize(x: Tensor) -> Tensor:
    """Subtracts each row's mean (N, D) and divides by its standard deviation and sqrt(D), so rows have unit length (appendix F.6)."""
    x = at_least_float32(x)
    return F.layer_norm(x, x.shape[-1:], eps=NORMALIZATION_EPS) / x.shape[-1] ** 0.5


def batch_normalize(x: Tensor) -> Tensor:
    """Normalises each column (N, D) over the rows of all ranks and divides by sqrt(D); it has no learnt parameters (appendix F.6)."""
    x = at_least_float32(x)
    variance, mean = torch.var_mean(all_ranks(x), dim=0, correction=0)
    return (x - mean) * torch.rsqrt(variance + NORMALIZATION_EPS) / x.shape[-1] ** 0.5


NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": l2_normalize,
    "layer_norm": layer_normalize,
    "batch_norm": batch_normalize,
    "none": at_least_float32,
}
"""Normalisation functions under the names that `ObjectiveConfig.normalization` takes."""


def regression_loss(prediction: Tensor, projection: Tensor, *, normalization: str = "l2") -> Tensor:
    """Squared distance between the normalised vectors, per row, (N,). For unit vectors it is 2 - 2 cos, in [0, 4] (equation 2)."""
    normalize = NORMALIZATIONS[normalization]
    return (normalize(prediction) - normalize(projection)).square().sum(dim=-1)


def byol_loss(prediction1: Tensor, prediction2: Tensor, projection1: Tensor, projection2: Tensor, *, normalization: str = "l2") -> Tensor:
    """Mean over the batch of the sum of both directions: a scalar, in [0, 8] for unit vectors.

    All are (N, D): the online predictions of each view, and the *target* projections, without gradient.
    """
    forward = regression_loss(prediction1, projection2, normalization=normalization)
    backward = regression_loss(prediction2, projection1, normalization=normalization)
    # The sum is not halved: halving it once cost another library 11 points of accuracy (lightly, pull request 1286).
    return (forward + backward).mean()


def infonce_beta_loss(
    prediction1: Tensor, prediction2: Tensor, projection1: Tensor, projection2: Tensor, *, beta: float, alpha: float
) -> Tensor:
    """The negative of the paper's InfoNCE-beta objective: a scalar, symmetrised over the views (equations 6 to 9).

    beta = 0 is byol_loss - 4; beta = 1 with predictions = projections = online projections is SimCLR times 2 alpha. Each of this
    rank's N rows is compared with the 2M - 1 other rows of all ranks, where M = N * ranks; gradients flow back to the rows of other
    ranks. beta weighs the negative term; alpha > 0 is the temperature.
    """
    keys1, keys2 = all_ranks(l2_normalize(projection1)), all_ranks(l2_normalize(projection2))
    forward = _one_direction(l2_normalize(prediction1), same_view=keys1, other_view=keys2, beta=beta, alpha=alpha)
    backward = _one_direction(l2_normalize(prediction2), same_view=keys2, other_view=keys1, beta=beta, alpha=alpha)
    # The paper maximises its objective; the factor 2 makes beta = 0 equal to the regression up to a constant.
    return -2 * (forward + backward)


def _one_direction(query: Tensor, *, same_view: Tensor, other_view: Tensor, beta: float, alpha: float) -> Tensor:
    own = _first_row_of_rank(len(query)) + torch.arange(len(query), device=query.device)
    # Outside autocast: in bf16 the cosines of the closest pairs would come in steps of 1/256, and are then divided by alpha.
    # (Meta tensors, of the trace of a step without a GPU, have no autocast.)
    with nullcontext() if query.is_meta else torch.autocast(query.device.type, enabled=False):
        across, among = query @ other_view.T, query @ same_view.T
    positive = across.gather(1, own[:, None]).squeeze(1)
    # An image must not be its own negative: -inf removes it from the logsumexp.
    among = among.scatter(1, own[:, None], float("-inf"))
    negative = torch.logsumexp(torch.cat([among, across], dim=1) / alpha, dim=1)
    return (positive - beta * alpha * negative).mean()


def least_squares_prediction(projection: Tensor, predicted: Tensor) -> Tensor:
    """Returns (N, D): projection times the linear map Q that brings all ranks' projections closest to the predicted ones (appendix I.2).

    projection: (N, D), online; gradients flow through it, not through Q. predicted: (N, D), the same images' other view. With fewer rows
    than D, several maps are equally close and Q is the one with the smallest norm.
    """
    # In float64: the condition number of the product matrix is the square of that of the projections.
    linear_map = _least_squares_map(projection.detach().double(), predicted.detach().double())
    return (projection.double() @ linear_map).to(at_least_float32(projection).dtype)


def _least_squares_map(projection: Tensor, predicted: Tensor) -> Tensor:
    products = torch.cat([projection.T @ projection, projection.T @ predicted], dim=1)
    # Those of all ranks' rows, so the map is the same on every rank.
    if dist.is_initialized() and dist.get_world_size() > 1:
        products = summed(products)
    own, across = products.chunk(2, dim=1)
    # The pseudo-inverse, because the Gram matrix is singular with fewer rows than dimensions.
    return torch.linalg.pinv(own, hermitian=True) @ across


def all_ranks(x: Tensor) -> Tensor:
    """Returns the rows of all ranks in rank order, (N * ranks, D), with gradients; with one process, x itself."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _GatherRanks.apply(x)  # type: ignore[return-value]


class _GatherRanks(torch.autograd.Function):
    """All-gather with gradient. torch.distributed.nn.functional.all_gather does the same, but torch.compile cannot trace it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gathered(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Every rank's loss depends on these rows, so their gradients are summed before each rank takes its own part.
        return summed(gradients[0]).chunk(dist.get_world_size())[dist.get_rank()]


def _first_row_of_rank(num_rows: int) -> int:
    return dist.get_rank() * num_rows if dist.is_initialized() else 0
