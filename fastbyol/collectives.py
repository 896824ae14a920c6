"""Sums and gathers over all ranks as operations with a result, in place of nothing, so that torch.compile traces them into its graph.

torch 2.11 also traces the collectives of torch.distributed that write into a tensor, but gradients came out of that graph as zero.
"""

from __future__ import annotations

import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

# torch 2.14 renamed it and warns; 2.11 has the old name only.
_all_gather = getattr(functional, "all_gather_single", functional.all_gather_tensor)


def gathered(x: Tensor) -> Tensor:
    """(ranks * N, ...): every rank's x (N, ...), in rank order; N is equal on all ranks."""
    return functional.wait_tensor(_all_gather(x.contiguous(), gather_dim=0, group=_everybody()))


def summed(x: Tensor) -> Tensor:
    """The sum of every rank's x."""
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group=_everybody()))


def _everybody() -> dist.ProcessGroup:
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("the process group is not initialised")
    return group
