"""Batch norm over all ranks: the statistics that one device would have with the whole batch.

torch's nn.SyncBatchNorm refuses the CPU, syncs the host in every forward and breaks torch.compile's graph. This one gathers (mean, M2, count) once
per forward and sums two vectors once per backward, with no host sync, on gloo and NCCL; shares of unequal size are exact.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# torch 2.14 renamed it and warns; 2.11 has the old name only.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class CrossReplicaBatchNorm(nn.modules.batchnorm._BatchNorm):
    """nn.BatchNorm1d/2d whose training statistics are those of all ranks together; same parameters, buffers and state dict.

    It may not subclass nn.SyncBatchNorm: DDP refuses that class on the CPU.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (N, C, ...), got {input.dim()} dimensions")

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        output, mean, variance, count = _CrossReplicaNormalise.apply(input, self.weight, self.bias, self.eps)  # type: ignore[misc]
        self._update_running(mean, variance, count)
        return output

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        # momentum None is a cumulative average, as in torch: the weight of the new batch is 1 / batches so far.
        weight = self.momentum if self.momentum is not None else self.num_batches_tracked.to(mean).reciprocal()
        unbiased = variance * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean), weight)
        self.running_var.lerp_(unbiased.to(self.running_var), weight)


class _CrossReplicaNormalise(torch.autograd.Function):
    """(input, weight, bias, eps) -> (output, mean (C), biased variance (C), count (1)); statistics in float32, or float64 for float64 input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        local = torch.cat(_local_statistics(input))
        gathered = local.new_empty(dist.get_world_size(), len(local))
        _all_gather(gathered.view(-1), local)
        mean, variance, count = _combine(gathered, channels=input.shape[1])
        inverse_std = torch.rsqrt(variance + eps)
        output = (input.to(mean.dtype) - _per_channel(mean, input)) * _per_channel(inverse_std, input)
        if weight is not None and bias is not None:
            output = output * _per_channel(weight.to(mean.dtype), input) + _per_channel(bias.to(mean.dtype), input)
        ctx.save_for_backward(input, weight, mean, inverse_std, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return output.to(input.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, inverse_std, count = ctx.saved_tensors
        gradient = gradients[0].to(mean.dtype)
        normalised = (input.to(mean.dtype) - _per_channel(mean, input)) * _per_channel(inverse_std, input)
        sum_g = gradient.sum(_all_but_channel(input))
        sum_gx = (gradient * normalised).sum(_all_but_channel(input))
        # Parameter gradients stay local: DDP averages them like all others.
        weight_gradient, bias_gradient = (sum_gx.to(weight.dtype), sum_g.to(weight.dtype)) if weight is not None else (None, None)
        totals = torch.stack([sum_g, sum_gx])
        dist.all_reduce(totals)
        mean_g, mean_gx = totals / count
        input_gradient = (gradient - _per_channel(mean_g, input) - normalised * _per_channel(mean_gx, input)) * _per_channel(
            inverse_std, input
        )
        if weight is not None:
            input_gradient = input_gradient * _per_channel(weight.to(mean.dtype), input)
        return input_gradient.to(input.dtype), weight_gradient, bias_gradient, None


def _all_but_channel(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.view([1, -1] + [1] * (x.dim() - 2))


def _local_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, sum of squared deviations, count) of each channel of this rank's share, which may be empty."""
    values = x if x.dtype == torch.float64 else x.float()
    count = values.new_full((1,), x.numel() // x.shape[1])
    mean = values.sum(_all_but_channel(x)) / count.clamp_min(1)
    return mean, (values - _per_channel(mean, x)).square().sum(_all_but_channel(x)), count


def _combine(statistics: Tensor, *, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ranks, 2C + 1) -> mean, biased variance, count over all (Chan et al.'s parallel formula, in rank order)."""
    means, deviations, counts = statistics.split([channels, channels, 1], dim=1)
    count = counts.sum(0)
    mean = (means * counts).sum(0) / count
    return mean, (deviations + counts * (means - mean).square()).sum(0) / count, count


def convert_to_cross_replica(module: nn.Module) -> nn.Module:
    """The same module with each batch norm replaced, in place where it has children.

    The very Parameter and buffer objects move over: new ones would unfreeze the target, and DDP would fail at the second step.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, CrossReplicaBatchNorm):
        replacement = CrossReplicaBatchNorm(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
        replacement.weight, replacement.bias = module.weight, module.bias
        replacement.running_mean, replacement.running_var = module.running_mean, module.running_var
        replacement.num_batches_tracked = module.num_batches_tracked
        return replacement.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, convert_to_cross_replica(child))
    return module
