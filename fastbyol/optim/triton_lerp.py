"""Moves the target in one Triton launch over all tensors: a table of addresses and chunks replaces one launch per tensor.

Tested by Triton's interpreter on the CPU (TRITON_INTERPRET=1); never run on a GPU by us.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbyol.config.errors import UserError
from fastbyol.host.compile_cache import give_triton_a_cache
from fastbyol.host.saved_structure import is_dense
from fastbyol.optim.memory_order import same_order

CHUNK = 4096
_TABLES_KEPT = 4
give_triton_a_cache()
_tables: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()


@triton.jit
def _lerp_kernel(table, weight, CHUNK: tl.constexpr):
    # One row per chunk: address of the target's chunk, of the online one's, elements in it.
    row = table + 3 * tl.program_id(0)
    target = tl.load(row).to(tl.pointer_type(tl.float32))
    online = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    offset = tl.arange(0, CHUNK)
    inside = offset < tl.load(row + 2)
    t = tl.load(target + offset, mask=inside)
    o = tl.load(online + offset, mask=inside)
    tl.store(target + offset, t + tl.load(weight) * (o - t), mask=inside)


def multi_tensor_lerp_(target: Sequence[Tensor], online: Sequence[Tensor], weight: float | Tensor) -> None:
    """Sets target <- target + weight (online - target), in place.

    Raises UserError if a tensor is not on CUDA, not float32, not dense, or laid out in another order than its partner.
    """
    if not target:
        return
    device = target[0].device
    if device.type != "cuda" and isinstance(_lerp_kernel, triton.JITFunction):  # Triton's interpreter replaces that class
        raise UserError(f"optim.update = 'triton': the tensors are on {device}; it needs CUDA, or take 'foreach'")
    if not isinstance(weight, Tensor):
        weight = torch.full((), weight, dtype=torch.float32, device=device)  # a fill on the device: no copy to wait for
    table = _table_of(target, online)
    _lerp_kernel[(len(table),)](table, weight.to(device, torch.float32), CHUNK=CHUNK)  # type: ignore[index]


def _table_of(target: Sequence[Tensor], online: Sequence[Tensor]) -> Tensor:
    """Returns the kernel's table, (chunks, 3) int64 on the device."""
    # Kept while the tensors stay at their addresses, so only the first step copies it to the device.
    key = tuple((t.data_ptr(), o.data_ptr(), t.shape, t.stride(), o.stride()) for t, o in zip(target, online, strict=True))
    if key not in _tables:
        rows = [row for t, o in zip(target, online, strict=True) for row in _rows(t, o)]
        _tables[key] = torch.tensor(rows, dtype=torch.int64).to(target[0].device)
        if len(_tables) > _TABLES_KEPT:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return _tables[key]


def _rows(target: Tensor, online: Tensor) -> list[tuple[int, int, int]]:
    if target.shape != online.shape or target.device != online.device or not (is_dense(target) and same_order(target, online)):
        raise UserError(
            f"optim.update = 'triton': target {tuple(target.shape)} {target.stride()} on {target.device} and online {tuple(online.shape)} "
            f"{online.stride()} on {online.device} must be dense and laid out alike; take 'foreach'"
        )
    if target.dtype != torch.float32 or online.dtype != torch.float32:
        raise UserError(
            f"optim.update = 'triton': target is {target.dtype}, online {online.dtype}; both must be float32, or take 'foreach'"
        )
    size = target.element_size()
    starts = range(0, target.numel(), CHUNK)
    return [(target.data_ptr() + s * size, online.data_ptr() + s * size, min(CHUNK, target.numel() - s)) for s in starts]
