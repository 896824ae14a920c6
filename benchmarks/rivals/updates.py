"""The target's update as other libraries write it, each by the operations of its own source."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def solo_learn_update(target: Sequence[Tensor], online: Sequence[Tensor], tau: float) -> None:
    """solo-learn, solo/utils/momentum.py, MomentumUpdater.update: a new tensor for each parameter, from two temporaries."""
    for op, mp in zip(online, target, strict=True):
        mp.data = tau * mp.data + (1 - tau) * op.data


def lightly_update(target: Sequence[Tensor], online: Sequence[Tensor], tau: float) -> None:
    """lightly 1.6, lightly/models/utils.py, update_momentum: two passes over memory."""
    torch._foreach_mul_(list(target), tau)
    torch._foreach_add_(list(target), list(online), alpha=1 - tau)
