"""Replication over ranks: DistributedDataParallel averages gradients while the backward pass is still running."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from fastbyol.config.schema import PrecisionConfig


def replicate(module: nn.Module, config: PrecisionConfig, *, accumulate: int) -> nn.Module:
    """Wraps the module in DistributedDataParallel over all ranks. Frozen parameters, and so the target's, are not synchronised."""
    # static_graph spares DDP the search for unused parameters. But torch's no_sync, which micro-batches need, fails on a static graph
    # ('INTERNAL ASSERT FAILED', torch 2.14).
    # broadcast_buffers: those of BN are equal on all ranks by construction, or each rank's own. torch 2.14 has a new name for the option,
    # which 2.11 does not know, and warns.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=accumulate == 1)
    if config.gradient_messages == "bf16":
        model.register_comm_hook(None, bf16_compress_hook)
    return model


def gradient_reduction(model: nn.Module, *, now: bool) -> AbstractContextManager[object]:
    """Returns a context in which DDP averages gradients only if `now`: once per step, in its last backward."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not now else nullcontext()
