"""The target's update: a moving average of the online parameters, fused over all tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(target: Sequence[Tensor], online: Sequence[Tensor], tau: float | Tensor) -> None:
    """target <- target + (1 - tau) (online - target), in place, one pass over memory (Grill et al., equation 1).

    Call it after the optimizer's step, on parameters only: BN statistics are each network's own.

    Args:
        target, online: tensors of equal shapes in equal order. Targets are float32 or float64: (1 - tau) falls to 1e-13 at the end of a run,
            which a bf16 target would swallow.
        tau: target decay rate in [0, 1]; a tensor avoids a sync where it is computed on the device.
    """
    if len(target) != len(online):
        raise ValueError(f"ema_update got {len(target)} target and {len(online)} online tensors; both lists must match")
    torch._foreach_lerp_(list(target), list(online), 1 - tau)


@torch.no_grad()
def ema_update_reference(target: Sequence[Tensor], online: Sequence[Tensor], tau: float) -> None:
    """The same, a tensor at a time as the equation is written."""
    for t, o in zip(target, online, strict=True):
        t.copy_(tau * t + (1 - tau) * o)
