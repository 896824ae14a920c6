"""Compares the order in which tensors of one shape hold their elements: kernels over flat memory pair elements by their place in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def laid_out_like(param: Tensor, other: Tensor) -> Tensor:
    """Returns the other tensor, or a copy of it in the parameter's memory order, which every kernel here needs.

    Raises:
        ValueError: the parameter has holes (a slice of a larger tensor), or the other tensor has another shape, dtype or device.
    """
    require_alike(param, other)
    if not is_dense(param):
        raise ValueError(
            f"parameter of shape {tuple(param.shape)} with strides {param.stride()}: must be dense, not a slice of a larger tensor"
        )
    return other if same_order(param, other) else torch.empty_like(param).copy_(other)


def require_alike(param: Tensor, other: Tensor) -> None:
    """Raises ValueError unless the tensors agree in shape, dtype and device: a kernel over flat memory would write past the shorter one."""
    if (param.shape, param.dtype, param.device) != (other.shape, other.dtype, other.device):
        raise ValueError(
            f"a tensor of {tuple(other.shape)} {other.dtype} on {other.device} beside a parameter of {tuple(param.shape)} {param.dtype} "
            f"on {param.device}: must be alike"
        )


def same_order(a: Tensor, b: Tensor) -> bool:
    """Says whether two tensors of one shape hold their elements in the same order; the stride of a dimension of size 1 does not matter."""
    return a.stride() == b.stride() or all(s == t for s, t, n in zip(a.stride(), b.stride(), a.shape, strict=True) if n > 1)


def is_dense(tensor: Tensor) -> bool:
    """Says whether the elements fill their part of memory without gaps, in any order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True
