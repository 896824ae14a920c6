"""In which order tensors of one shape hold their elements: kernels over flat memory pair them by it."""

from __future__ import annotations

import torch
from torch import Tensor


def laid_out_like(param: Tensor, other: Tensor) -> Tensor:
    """The other tensor, or a copy of it whose memory order pairs with the parameter's, as every kernel here needs.

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
