"""Counts the bytes that a piece of work moves if no cache helps: the sizes of everything its operations read and write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _TrafficCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _moves_nothing(func):
            self.num_bytes += sum(_size(leaf) for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor))
        return result


def bytes_moved(work: Callable[[], object]) -> int:
    """Returns the bytes of all operands and results of the tensor operations in `work`, forward and backward; views and allocations
    count nothing.

    Only torch operations are seen; the fused update's kernel is not.
    """
    with _TrafficCounter() as counter:
        work()
    return counter.num_bytes


def _moves_nothing(func: Any) -> bool:
    aliases = [argument.alias_info for argument in func._schema.arguments]
    is_view = any(info is not None and not info.is_write for info in aliases)
    return is_view or func._schema.name.startswith(("aten::empty", "aten::detach", "aten::_reshape_alias"))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
