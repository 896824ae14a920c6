"""Sum, maximum and gather over all ranks as functions that return a new tensor, so that torch.compile can trace them into its graph.

torch 2.11 can also trace the in-place collectives of torch.distributed, but gradients through that graph were zero. A group is given by
its name, which the compiler takes for a constant; '' means all ranks.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed.distributed_c10d import _get_group_size_by_name

# torch 2.14 renamed it and warns about the old name, the only one that 2.11 has.
_all_gather = getattr(functional, "all_gather_single", functional.all_gather_tensor)


def gathered(x: Tensor, *, group: str = "") -> Tensor:
    """Returns every rank's x (N, ...) in rank order, (ranks * N, ...); N must be equal on all ranks."""
    return functional.wait_tensor(_all_gather(x.contiguous(), gather_dim=0, group=_named(group)))


def summed(x: Tensor, *, group: str = "") -> Tensor:
    """Returns the sum of every rank's x."""
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group=_named(group)))


def largest(x: Tensor) -> Tensor:
    """Returns the elementwise maximum of every rank's x; x itself in a process without ranks."""
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "max", group=_named(""))) if dist.is_initialized() else x


def num_ranks(group: str = "") -> int:
    """Returns the number of ranks in the group."""
    return _get_group_size_by_name(_named(group)) if group else dist.get_world_size()


def _named(name: str) -> Any:  # what torch's functions take, whose types differ between versions
    group = name or dist.group.WORLD
    if group is None:
        raise RuntimeError("the process group is not initialised")
    return group
