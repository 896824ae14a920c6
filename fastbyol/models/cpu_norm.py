"""Batch norm per view, the sum with a shortcut and ReLU as one operation with its own backward, on a CPU (`norm_kernel.py`).

Memory bandwidth limits this work, so everything is done in as few passes as the statistics allow. Over ranks the same passes are made,
with the messages of `sync_batchnorm.py` between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fastbyol.host.kernel_threads import in_threads
from fastbyol.models import norm_kernel
from fastbyol.models.norm_kernel import F32, F64, Rows
from fastbyol.models.sync_batchnorm import Normalised, combined_over_ranks
from fastbyol.ranks.collectives import summed

# Elements that a thread takes at once. Sums are taken per piece, so the result does not depend on the number of threads.
_PIECE = 1 << 20
# Minimum length of a kernel's inner loop. Four rows are summed at a time, and the CPU fetches memory ahead only while each of them goes on: rows of
# 2048 instead of 512 take 0.14 instead of 0.26 ns an element from memory (Zen 4). The other kernels, with more arrays, are slower with them.
_WIDTH, _MOMENTS_WIDTH = 512, 2048
_SAMPLE = 16
_FLOOR = {True: np.float32(0), False: np.float32(-np.inf)}
"""Lower limit of the output, with and without ReLU."""


def fits_cpu(norm: _BatchNorm, x: Tensor, shortcut: Tensor | None = None, *, views: int, across_ranks: bool) -> bool:
    """Returns True if the kernel can do this layer's work on this input."""
    kind = norm.training and norm.affine and norm.weight.dtype == torch.float32 and not torch.compiler.is_compiling()
    right_kind = kind and x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32)
    same = shortcut is None or (shortcut.dtype == x.dtype and shortcut.shape == x.shape and _is_in_rows(shortcut))
    enough = len(x) % views == 0 and _rows_per_view(x, views) > (0 if across_ranks else 1)
    return right_kind and same and _is_in_rows(x) and enough


def normalise_on_cpu(
    norm: _BatchNorm, x: Tensor, shortcut: Tensor | None = None, *, views: int, across_ranks: bool, group: str = "", relu: bool
) -> Normalised:
    """Returns norm(x) + shortcut, through a ReLU if asked, and the statistics of each view, over all ranks of the group if asked."""
    output, mean, variance, _, count = _norm_relu(x, norm.weight, norm.bias, shortcut, norm.eps, views, across_ranks, group, relu)
    return Normalised(output, mean, variance, count)


def _is_in_rows(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.dim() == 2 and x.is_contiguous()


def _rows_per_view(x: Tensor, views: int) -> int:
    return x.numel() // (x.shape[1] * views)


@torch.library.custom_op("fastbyol::norm_relu", mutates_args=())
def _norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, eps: float, views: int, across_ranks: bool, group: str, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the output; mean, biased variance and 1 / std, each (views, C) float32; and the number of elements behind them, (1,)."""
    output = torch.empty_like(x)
    mean, variance = (np.stack(v) for v in zip(*map(_moments, _by_view(x, views)), strict=True))
    count = weight.new_full((1,), _rows_per_view(x, views))
    if across_ranks:
        own_mean, deviation = (torch.from_numpy(v).to(weight.dtype) for v in (mean, variance * _rows_per_view(x, views)))
        *whole, count = combined_over_ranks(own_mean, deviation, count, group=group)
        mean, variance = (v.double().numpy() for v in whole)
    inverse_std = 1 / np.sqrt(variance + eps)
    scale = weight.detach().numpy() * inverse_std
    offset = bias.detach().numpy() - scale * mean
    kernel = norm_kernel.normalise if shortcut is None else norm_kernel.normalise_add
    tensors = (x, output) if shortcut is None else (x, shortcut, output)
    for *channels, rows in zip(scale, offset, _rows_of(tensors, views), strict=True):
        _in_pieces(kernel, *rows, channels=channels, numbers=(_FLOOR[relu],))
    mean, variance, inverse_std = (torch.from_numpy(v).to(weight.dtype) for v in (mean, variance, inverse_std))
    return output, mean, variance, inverse_std, count


@torch.library.custom_op("fastbyol::norm_relu_backward", mutates_args=())
def _norm_relu_backward(
    gradient: Tensor,
    x: Tensor,
    output: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    count: Tensor,
    has_shortcut: bool,
    across_ranks: bool,
    group: str,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight, bias and shortcut (an empty tensor if there is none)."""
    views = len(mean)
    # The encoder's last gradient is that of the mean over pixels: expanded, without memory of its own.
    incoming = gradient.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)
    if relu:
        masked = torch.empty_like(x)
        kernel, tensors = norm_kernel.mask_gradient, (incoming, output, x, masked)
    else:
        masked = incoming.clone() if has_shortcut else incoming  # a custom operator may not return one of its inputs
        kernel, tensors = norm_kernel.gradient_sums, (incoming, x)
    sums = [_sums(kernel, *rows, channels=mu) for rows, mu in zip(_rows_of(tensors, views), mean.numpy(), strict=True)]
    total, product = np.stack(sums, axis=1)
    of_x = torch.empty_like(x)
    product *= inverse_std.numpy()
    # Parameter gradients stay local: DDP averages them like all others.
    of_weight, of_bias = (torch.from_numpy(v.sum(0)).to(weight.dtype) for v in (product, total))
    if across_ranks:
        total, product = summed(torch.from_numpy(np.stack([total, product])).to(weight.dtype), group=group).double().numpy()
    a = weight.detach().numpy() * inverse_std.numpy().astype(np.float64)
    b = -a * inverse_std.numpy() * product / count.numpy()
    c = -a * total / count.numpy() - b * mean.numpy()
    for *channels, rows in zip(a, b, c, _rows_of((masked, x, of_x), views), strict=True):
        _in_pieces(norm_kernel.input_gradient, *rows, channels=channels)
    return of_x, of_weight, of_bias, masked if has_shortcut else x.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, shortcut, _, _, ctx.across_ranks, ctx.group, ctx.relu = inputs
    result, mean, variance, inverse_std, count = output
    ctx.mark_non_differentiable(mean, variance, inverse_std, count)
    # The output, not the mask of the ReLU: it is kept anyway as the input of the next convolution.
    ctx.save_for_backward(x, result if ctx.relu else x, weight, mean, inverse_std, count)
    ctx.has_shortcut = shortcut is not None


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    options = ctx.has_shortcut, ctx.across_ranks, ctx.group, ctx.relu
    of_x, of_weight, of_bias, of_shortcut = _norm_relu_backward(gradients[0], *ctx.saved_tensors, *options)
    return of_x, of_weight, of_bias, of_shortcut if ctx.has_shortcut else None, *[None] * 5


_norm_relu.register_autograd(_backward, setup_context=_save)


def _by_view(x: Tensor, views: int) -> Sequence[Rows]:
    """Returns each view's pixels as rows of channels; bfloat16 as its bits in uint16."""
    x = x.detach()
    rows = (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).view(views, -1, x.shape[1])
    return list((rows.view(torch.uint16) if x.dtype == torch.bfloat16 else rows).numpy())


def _rows_of(tensors: Iterable[Tensor], views: int) -> list[tuple[Rows, ...]]:
    """Returns, for each view, its rows in every tensor."""
    return list(zip(*(_by_view(tensor, views) for tensor in tensors), strict=True))


def _moments(x: Rows) -> tuple[F64, F64]:
    """Returns mean and biased variance of each channel."""
    # Sums are taken relative to the mean of a few rows, so that a large mean costs no precision.
    few = x[:: -(-len(x) // _SAMPLE)]
    shift = ((few.astype(np.uint32) << 16).view(np.float32) if few.dtype == np.uint16 else few).mean(0, dtype=np.float64)
    shift = shift.astype(np.float32).astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinities and NaN are passed on, not reported
        mean, square = _sums(norm_kernel.moments, x, channels=shift, min_width=_MOMENTS_WIDTH) / len(x)
        return mean + shift, np.maximum(square - mean**2, 0)


def _sums(kernel: Callable[..., F64], *rows: Rows, channels: F64 | F32, min_width: int = _WIDTH) -> F64:
    """Returns the sum of the kernel's results over all pieces, (2, channels)."""
    return np.sum(_in_pieces(kernel, *rows, channels=[channels], min_width=min_width), axis=0).reshape(2, -1, len(channels)).sum(1)


def _in_pieces(
    kernel: Callable[..., Any], *rows: Rows, channels: Iterable[F64 | F32], numbers: Sequence[np.float32] = (), min_width: int = _WIDTH
) -> list[Any]:
    """Returns the kernel's result for each piece of the rows. Its arguments: the rows, a value for each of their channels, plain numbers."""
    num_rows, width = rows[0].shape
    # With few channels several pixels are treated as one row, so that the kernel's inner loop is long enough.
    fold = math.gcd(num_rows, min_width // width) if width < min_width else 1
    values = [np.tile(v.astype(np.float32), fold) for v in channels]
    wide = [array.reshape(-1, fold * width) for array in rows]
    step = max(1, _PIECE // (fold * width))

    def work(start: int) -> Any:
        return kernel(*(array[start : start + step] for array in wide), *values, *numbers)

    return in_threads(work, range(0, num_rows // fold, step))
