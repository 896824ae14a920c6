"""Compares the order in which tensors of one shape hold their elements: kernels over flat memory pair elements by their place in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbyol.host.saved_structure import is_dense


def laid_out_like(param: Tensor, other: Tensor) -> Tensor:
    """Returns the other tensor, or a copy of it in the parameter's memory order, which every kernel here needs.

    Raises ValueError if the parameter has holes (a slice of a larger tensor), or the other tensor another shape, dtype or device.
    """
    # A kernel over flat memory would write past the shorter one.
    if (param.shape, param.dtype, param.device) != (other.shape, other.dtype, other.device):
        raise ValueError(
            f"a tensor of {tuple(other.shape)} {other.dtype} on {other.device} beside a parameter of {tuple(param.shape)} {param.dtype} "
            f"on {param.device}: must be alike"
        )
    if not is_dense(param):
        strides = f"parameter of shape {tuple(param.shape)} with strides {param.stride()}"
        raise ValueError(f"{strides}: must be dense, not a slice of a larger tensor")
    return other if same_order(param, other) else torch.empty_like(param).copy_(other)


def same_order(a: Tensor, b: Tensor) -> bool:
    """Says whether two tensors of one shape hold their elements in the same order."""
    # The stride of a dimension of size 1 is never used: torch may set it to anything.
    return a.stride() == b.stride() or all(s == t for s, t, n in zip(a.stride(), b.stride(), a.shape, strict=True) if n > 1)
