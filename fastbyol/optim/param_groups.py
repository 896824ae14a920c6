"""What skips weight decay and trust scaling."""

from __future__ import annotations

from typing import Any

from torch import nn


def byol_param_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups of the module's trainable parameters: weights, and biases with BN scales and offsets (`adapt=False`: no decay, no trust scaling).

    Source: the official utils/optimizers.py excludes leaves named `b` and parents named `*norm*`; in PyTorch these are the tensors with one
    dimension or none.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "adapt": True},
        {"params": [p for p in trainable if p.ndim <= 1], "adapt": False, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
