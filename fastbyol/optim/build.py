"""The optimizer that a config names."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from fastbyol.config.errors import UserError
from fastbyol.config.schema import OptimConfig
from fastbyol.optim.lars import LARS
from fastbyol.optim.param_groups import byol_param_groups


def build_optimizer(config: OptimConfig, module: nn.Module) -> Optimizer:
    """An optimizer over the module's trainable parameters, learning rate 0 until the schedule sets it."""
    groups = byol_param_groups(module)
    if config.name == "lars":
        return LARS(groups, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay, trust_coefficient=config.trust_coefficient)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=config.weight_decay)
    return _torch_optimizer_lars(config, groups)


def _torch_optimizer_lars(config: OptimConfig, groups: list[dict[str, object]]) -> Optimizer:
    """torch-optimizer's LARS, for comparison. Differs from the paper: divides by |g| + wd |w| + 1e-8, and skips tensors whose gradient is 0."""
    try:
        from torch_optimizer import LARS as TorchOptimizerLARS
    except ImportError as error:
        raise UserError(
            "optim.name = 'torch_optimizer_lars': torch-optimizer is not installed; pip install 'fastbyol[torch-optimizer]'"
        ) from error
    # Its constructor refuses lr = 0; the schedule sets the group's value before every step.
    return TorchOptimizerLARS(
        groups, lr=1.0, momentum=config.momentum, weight_decay=config.weight_decay, trust_coefficient=config.trust_coefficient
    )
