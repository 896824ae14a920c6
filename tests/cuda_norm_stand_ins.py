"""Torch's CUDA kernels of nn.SyncBatchNorm, written as formulas that run on a CPU: for tests of code that calls them.

Source: aten/src/ATen/native/cuda/Normalization.cuh and torch/nn/modules/_functions.py, whose SyncBatchNorm runs on them in the tests too.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _within(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _along(v: Tensor, x: Tensor) -> Tensor:
    return v.view([1, -1] + [1] * (x.dim() - 2))


def stats(input: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(_wide(input), _within(input), correction=0)
    return mean, torch.rsqrt(variance + eps)


def gather_stats_with_counts(input, mean, invstd, running_mean, running_var, momentum, eps, counts):
    weight = counts[:, None]
    total = weight.sum()
    center = (mean * weight).sum(0) / total
    variance = ((invstd.pow(-2) - eps + (mean - center).square()) * weight).sum(0) / total
    running_mean.lerp_(center.to(running_mean), momentum)
    running_var.lerp_((variance * total / (total - 1)).to(running_var), momentum)
    return center, torch.rsqrt(variance + eps)


def elemt(input, weight, bias, mean, invstd, eps):
    x = _wide(input)
    return ((x - _along(mean, x)) * _along(invstd * weight, x) + _along(bias, x)).to(input.dtype)


def elemt_out(input, weight, bias, mean, invstd, eps, *, out):
    return out.copy_(elemt(input, weight, bias, mean, invstd, eps))


def backward_reduce(grad_out, input, mean, invstd, weight, input_g, weight_g, bias_g):
    g, x = _wide(grad_out), _wide(input)
    product = (g * (x - _along(mean, x))).sum(_within(x))
    of_output = g.sum(_within(x))
    return of_output, product, (product * invstd).to(weight.dtype), of_output.to(weight.dtype)


def backward_elemt(grad_out, input, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    g, x, total = _wide(grad_out), _wide(input), count.sum()
    centred = (x - _along(mean, x)) * _along(invstd.square() * sum_dy_xmu / total, x)
    return ((g - _along(sum_dy / total, x) - centred) * _along(invstd * weight, x)).to(input.dtype)


def registered() -> torch.library.Library:
    """Makes the operations run on the CPU as long as the result is kept."""
    library = torch.library.Library("aten", "IMPL")
    formulas = {
        "batch_norm_stats": stats,
        "batch_norm_gather_stats_with_counts": gather_stats_with_counts,
        "batch_norm_elemt": elemt,
        "batch_norm_elemt.out": elemt_out,
        "batch_norm_backward_reduce": backward_reduce,
        "batch_norm_backward_elemt": backward_elemt,
    }
    for name, formula in formulas.items():
        library.impl(name, formula, "CPU")
    return library
