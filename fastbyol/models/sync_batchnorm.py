"""Batch norm over all ranks: the same statistics as one device with the whole batch.

torch's nn.SyncBatchNorm does not run on the CPU, synchronises the host in every forward and breaks torch.compile's graph. This one
gathers (mean, M2, count) once per forward and sums two vectors once per backward, for both views in one message, without host sync,
on gloo and NCCL. Shares of unequal size are exact. It consists of plain tensor operations, so Inductor can fuse them with the ReLU
and the sum around them (not measured on a GPU yet).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbyol.ranks.collectives import gathered, summed


class Normalised(NamedTuple):
    """Output, like the input; mean and biased variance, (views, C); and the number of elements behind each of them, (1,)."""

    output: Tensor
    mean: Tensor
    variance: Tensor
    count: Tensor


def cross_replica_normalise(input: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, views: int) -> Normalised:
    """Normalises each view with its statistics over all ranks, then scales and shifts it with weight and bias, (C,), or both None.

    input: (views * N, C, ...), one view after the other; N may differ between ranks and be 0.
    """
    output, mean, variance, count = _CrossReplicaNormalise.apply(input, weight, bias, eps, views)  # type: ignore[misc]
    # Flatten outside the Function: an output that is a view cannot be modified by an in-place ReLU.
    return Normalised(output.flatten(0, 1), mean, variance, count)


class _CrossReplicaNormalise(torch.autograd.Function):
    """Returns the output as (views, N, C, ...). Statistics and arithmetic are in float32, or float64 for float64 input."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, views: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = _by_view(input, views)
        local = _local_statistics(x)
        # Means and squared deviations instead of sums and sums of squares, whose difference loses precision when the mean is large.
        mean, variance, count = _combine(gathered(local).view(-1, len(local)), views=views)
        inverse_std = torch.rsqrt(variance + eps)
        output = (x - _per_channel(mean, x)) * _per_channel(inverse_std, x)
        if weight is not None and bias is not None:
            output = output * _per_channel(weight.to(x.dtype)[None], x) + _per_channel(bias.to(x.dtype)[None], x)
        ctx.save_for_backward(input, weight, mean, inverse_std, count)
        ctx.mark_non_differentiable(mean, variance, count)
        ctx.views = views
        if output.dtype != input.dtype:  # when compiling, torch 2.11 loses the gradient through a cast to the same type
            output = output.to(input.dtype)
        return output, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, inverse_std, count = ctx.saved_tensors
        x = _by_view(input, ctx.views)
        gradient = gradients[0].to(x.dtype)
        normalised = (x - _per_channel(mean, x)) * _per_channel(inverse_std, x)
        sums = torch.stack([gradient.sum(_within_view(x)), (gradient * normalised).sum(_within_view(x))])
        # Parameter gradients stay local: DDP averages them like all others.
        bias_gradient, weight_gradient = sums.sum(1).to(weight.dtype) if weight is not None else (None, None)
        mean_g, mean_gx = summed(sums) / count
        input_gradient = gradient - _per_channel(mean_g, x) - normalised * _per_channel(mean_gx, x)
        scale = inverse_std if weight is None else inverse_std * weight.to(x.dtype)
        return (input_gradient * _per_channel(scale, x)).flatten(0, 1).to(input.dtype), weight_gradient, bias_gradient, None, None


def _by_view(x: Tensor, views: int) -> Tensor:
    """Returns x as (views, N, C, ...) in float32 or float64; strides, and so channels-last, are kept."""
    return (x if x.dtype == torch.float64 else x.float()).unflatten(0, (views, len(x) // views))


def _within_view(x: Tensor) -> list[int]:
    """Returns all dimensions of (views, N, C, ...) except the first and the channels."""
    return [1, *range(3, x.dim())]


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    """Reshapes (views or 1, C) so that it broadcasts over (views, N, C, ...)."""
    return v.view([len(v), 1, -1] + [1] * (x.dim() - 3))


def _local_statistics(x: Tensor) -> Tensor:
    """Returns this rank's (2 views C + 1,): each view's channel means and sums of squared deviations, then the number of elements."""
    count = x.new_full((1,), x.numel() // (x.shape[0] * x.shape[2]))
    # A rank without images has sums of 0, and its count of 0 gives them no weight.
    mean = x.sum(_within_view(x)) / count.clamp_min(1)
    deviation = (x - _per_channel(mean, x)).square().sum(_within_view(x))
    return torch.cat([mean.flatten(), deviation.flatten(), count])


def _combine(statistics: Tensor, *, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Combines (ranks, 2 views C + 1) into mean and biased variance (views, C) and the total count."""
    # Chan et al.'s parallel formula. In rank order, so that every rank gets the same bits.
    half = statistics.shape[1] // 2
    means, deviations, counts = statistics.split([half, half, 1], dim=1)
    count = counts.sum(0)
    mean = (means * counts).sum(0) / count
    variance = (deviations + counts * (means - mean).square()).sum(0) / count
    return mean.view(views, -1), variance.view(views, -1), count
