"""Batch norm of both views by torch's CUDA kernels for nn.SyncBatchNorm, for eager mode; compiled code uses plain operations instead.

In plain operations an eager step would spend most of its time here: several passes over float32 copies of every activation. These kernels
read and write each only as often as the statistics require, and each view is written to its place in one batch, without a copy of both.
We have not run this on a GPU yet: tests run it on the CPU, with stand-ins for torch's kernels that pass torch's own nn.SyncBatchNorm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fastbyol.models.sync_batchnorm import GATHERED_RANKS, combined_over_ranks
from fastbyol.ranks.collectives import gathered, num_ranks, summed


def fits_cuda(norm: _BatchNorm, x: Tensor) -> bool:
    """Returns True if the kernels can do this layer's work on this input."""
    tracks = norm.running_mean is not None and norm.momentum is not None
    return x.is_cuda and len(x) > 0 and norm.affine and tracks and not torch.compiler.is_compiling()


def normalise_on_cuda(norm: _BatchNorm, x: Tensor, *, views: int, across_ranks: bool, group: str = "") -> Tensor:
    """Normalises each view of x, (views * N, C, ...), with its own statistics, over all ranks of the group if asked, and updates the running ones.

    N must be equal on all ranks.
    """
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(views)
    buffers = norm.running_mean, norm.running_var
    return _Normalise.apply(x, norm.weight, norm.bias, *buffers, norm.momentum, norm.eps, views, across_ranks, group)  # type: ignore[return-value]


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        views: int,
        across_ranks: bool,
        group: str,
    ) -> Tensor:
        input = _dense(input, like=input)
        inputs = input.chunk(views)
        local = [torch.batch_norm_stats(x, eps) for x in inputs]
        mean, inverse_std = (torch.stack(parts) for parts in zip(*local, strict=True))
        means, inverse_stds, counts = (
            _of_all_ranks(mean, inverse_std, inputs[0], eps=eps, group=group)
            if across_ranks
            else (
                mean[None],
                inverse_std[None],
                _count(inputs[0], like=mean),
            )
        )
        output = torch.empty_like(input)
        total = []
        for view, (x, place) in enumerate(zip(inputs, output.chunk(views), strict=True)):
            statistics = means[:, view], inverse_stds[:, view]
            # It also moves the running statistics, by the unbiased variance of all ranks.
            mean, inverse_std = torch.batch_norm_gather_stats_with_counts(x, *statistics, running_mean, running_var, momentum, eps, counts)
            torch.batch_norm_elemt(x, weight, bias, mean, inverse_std, eps, out=place)
            total.append((mean, inverse_std))
        mean, inverse_std = (torch.stack(parts) for parts in zip(*total, strict=True))
        ctx.save_for_backward(input, weight, mean, inverse_std, counts.sum(0, keepdim=True).to(torch.int32))
        ctx.views, ctx.across_ranks, ctx.group = views, across_ranks, group
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, inverse_std, count = ctx.saved_tensors
        inputs, incoming = input.chunk(ctx.views), _dense(gradients[0], like=input).chunk(ctx.views)
        of_views = [
            torch.batch_norm_backward_reduce(g, x, mean[view], inverse_std[view], weight, True, True, True)
            for view, (g, x) in enumerate(zip(incoming, inputs, strict=True))
        ]
        of_output, of_product, of_weight, of_bias = (torch.stack(parts) for parts in zip(*of_views, strict=True))
        sums = torch.stack([of_output, of_product])
        if ctx.across_ranks:
            sums = summed(sums, group=ctx.group)
        result = torch.empty_like(input)
        for view, (g, x, place) in enumerate(zip(incoming, inputs, result.chunk(ctx.views), strict=True)):
            place.copy_(torch.batch_norm_backward_elemt(g, x, mean[view], inverse_std[view], weight, sums[0, view], sums[1, view], count))
        # Parameter gradients stay local: DDP averages them like all others.
        return result, of_weight.sum(0), of_bias.sum(0), *[None] * 7


def _dense(x: Tensor, *, like: Tensor) -> Tensor:
    """Returns x in channels-last memory if `like` is, else in the usual one: the kernels are slow where layouts differ, or expanded."""
    layout = torch.channels_last if x.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return x.contiguous(memory_format=layout)


def _count(x: Tensor, *, like: Tensor) -> Tensor:
    """Returns the number of elements behind each statistic of one view, (1,)."""
    return like.new_full((1,), x.numel() // x.shape[1])


def _of_all_ranks(mean: Tensor, inverse_std: Tensor, x: Tensor, *, eps: float, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns means and inverse deviations, (parts, views, C), and counts, (parts,): one part for each rank; with many ranks, one part for all of them."""
    count = _count(x, like=mean)
    if num_ranks(group) > GATHERED_RANKS:
        deviation = (inverse_std.pow(-2) - eps).clamp_min(0) * count
        mean, variance, count = combined_over_ranks(mean, deviation, count, group=group)
        return mean[None], torch.rsqrt(variance + eps)[None], count
    parts = gathered(torch.cat([mean.flatten(), inverse_std.flatten(), count]), group=group).view(-1, 2 * mean.numel() + 1)
    means, inverse_stds, counts = parts.split([mean.numel(), mean.numel(), 1], dim=1)
    return means.unflatten(1, mean.shape), inverse_stds.unflatten(1, mean.shape), counts.flatten()
