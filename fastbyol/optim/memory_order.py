"""In which order tensors of one shape hold their elements: kernels over flat memory pair them by it."""

from __future__ import annotations

import torch
from torch import Tensor


def laid_out_like(param: Tensor, other: Tensor) -> Tensor:
    """The other tensor, or a copy of it whose memory order pairs with the parameter's, as every kernel here needs.

    Raises:
        ValueError: the parameter has holes (a slice of a larger tensor).
    """
    if not is_dense(param):
        raise ValueError(
            f"parameter of shape {tuple(param.shape)} with strides {param.stride()}: must be dense, not a slice of a larger tensor"
        )
    return other if same_order(param, other) else torch.empty_like(param).copy_(other)


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold their elements in the same order; strides of dimensions of size 1 say nothing."""
    return a.stride() == b.stride() or all(s == t for s, t, n in zip(a.stride(), b.stride(), a.shape, strict=True) if n > 1)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their stretch of memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True
