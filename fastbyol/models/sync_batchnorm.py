"""Batch norm over all ranks: the same statistics as one device with the whole batch.

torch's nn.SyncBatchNorm does not run on the CPU, synchronises the host in every forward and breaks torch.compile's graph. This one
exchanges (mean, M2, count) once per forward and sums two vectors once per backward, for both views in one message, without host sync,
on gloo and NCCL. Shares of unequal size are exact. There are three forms of it: plain tensor operations, here, which Inductor fuses with
the ReLU and the sum around them; torch's CUDA kernels for eager mode (`cuda_norm.py`); our kernel on a CPU (`cpu_norm.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbyol.ranks.collectives import gathered, num_ranks, summed

GATHERED_RANKS = 16
"""Largest number of ranks that gather all statistics: their bytes grow with the ranks, and above it a sum is sent instead."""


class Normalised(NamedTuple):
    """Output, like the input; mean and biased variance, (views, C); and the number of elements behind each of them, (1,)."""

    output: Tensor
    mean: Tensor
    variance: Tensor
    count: Tensor


def cross_replica_normalise(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, views: int, group: str = ""
) -> Normalised:
    """Normalises each view with its statistics over all ranks, then scales and shifts it with weight and bias, (C,), or both None.

    input: (views * N, C, ...), one view after the other; N may differ between ranks and be 0. group: name of the process group that
    shares its statistics; '' means all ranks.
    """
    output, mean, variance, count = _CrossReplicaNormalise.apply(input, weight, bias, eps, views, group)  # type: ignore[misc]
    # Flatten outside the Function: an output that is a view cannot be modified by an in-place ReLU.
    return Normalised(output.flatten(0, 1), mean, variance, count)


def combined_over_ranks(mean: Tensor, deviation: Tensor, count: Tensor, *, group: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """Combines each rank's means and sums of squared deviations from them, (views, C), and its number of elements, (1,).

    Returns mean and biased variance (views, C) and the count, over all ranks and the same bits on each of them. Eager CUDA kernels send
    another message up to GATHERED_RANKS (`cuda_norm`), so ranks compile together or not at all (`run/precision.py`).
    """
    if num_ranks(group) > GATHERED_RANKS:
        return _sum_statistics(mean, deviation, count, group=group)
    parts = gathered(torch.cat([mean.flatten(), deviation.flatten(), count]), group=group).view(-1, 2 * mean.numel() + 1)
    # Chan et al.'s parallel formula. In rank order, so that every rank gets the same bits.
    means, deviations, counts = parts.split([mean.numel(), mean.numel(), 1], dim=1)
    count = counts.sum(0)
    total = (means * counts).sum(0) / count
    # Means and squared deviations instead of sums and sums of squares, whose difference loses precision when the mean is large.
    variance = (deviations + counts * (means - total).square()).sum(0) / count
    return total.view_as(mean), variance.view_as(mean), count


def _sum_statistics(mean: Tensor, deviation: Tensor, count: Tensor, *, group: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """Does the same as `combined_over_ranks` by one sum over ranks, whose bytes do not grow with their number."""
    # In float64, where the difference of squares loses nothing: float32 means are exact in it, and their squares too.
    size, precise = mean.numel(), torch.float64
    mean64, count64 = mean.flatten().to(precise), count.to(precise)
    sums = summed(torch.cat([count64 * mean64, deviation.flatten().to(precise) + count64 * mean64.square(), count64]), group=group)
    total = sums[:size] / sums[-1]
    variance = (sums[size:-1] / sums[-1] - total.square()).clamp_min(0)
    return total.to(mean.dtype).view_as(mean), variance.to(mean.dtype).view_as(mean), sums[-1:].to(mean.dtype)


class _CrossReplicaNormalise(torch.autograd.Function):
    """Returns the output as (views, N, C, ...). Statistics and arithmetic are in float32, or float64 for float64 input."""

    # Written so that the compiler keeps nothing but the 16-bit input for the backward. The forward uses a scale and an offset, the
    # backward the normalised input: one expression in both would be saved as a float32 tensor of its own, twice the input's memory.

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, views: int, group: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = _by_view(input, views)
        mean, variance, count = combined_over_ranks(*_local_statistics(x), group=group)
        inverse_std = torch.rsqrt(variance + eps)
        scale = inverse_std if weight is None else inverse_std * weight.to(x.dtype)
        offset = -mean * scale if bias is None else bias.to(x.dtype) - mean * scale
        output = x * _per_channel(scale, x) + _per_channel(offset, x)
        ctx.save_for_backward(input, weight, mean, inverse_std, count)
        ctx.mark_non_differentiable(mean, variance, count)
        ctx.views, ctx.group = views, group
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
        mean_g, mean_gx = summed(sums, group=ctx.group) / count
        input_gradient = gradient - _per_channel(mean_g, x) - normalised * _per_channel(mean_gx, x)
        scale = inverse_std if weight is None else inverse_std * weight.to(x.dtype)
        return (input_gradient * _per_channel(scale, x)).flatten(0, 1).to(input.dtype), weight_gradient, bias_gradient, None, None, None


def _by_view(x: Tensor, views: int) -> Tensor:
    """Returns x as (views, N, C, ...) in float32 or float64; strides, and so channels-last, are kept."""
    return (x if x.dtype == torch.float64 else x.float()).unflatten(0, (views, len(x) // views))


def _within_view(x: Tensor) -> list[int]:
    """Returns all dimensions of (views, N, C, ...) except the first and the channels."""
    return [1, *range(3, x.dim())]


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    """Reshapes (views or 1, C) so that it broadcasts over (views, N, C, ...)."""
    return v.view([len(v), 1, -1] + [1] * (x.dim() - 3))


def _local_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns this rank's means and sums of squared deviations, (views, C), and the number of elements behind each, (1,)."""
    count = x.new_full((1,), x.numel() // (x.shape[0] * x.shape[2]))
    if x.shape[1] == 0:  # a rank without images: its count of 0 gives its statistics no weight, unless they are NaN
        nothing = x.new_zeros(x.shape[0], x.shape[2])
        return nothing, nothing, count
    variance, mean = torch.var_mean(x, _within_view(x), correction=0)
    return mean, variance * count, count
