"""Splits parameters into groups: those without weight decay and trust scaling, and those with a learning rate of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

NO_FACTORS: Mapping[str, float] = MappingProxyType({})


def byol_param_groups(module: nn.Module, *, lr_factors: Mapping[str, float] = NO_FACTORS) -> list[dict[str, Any]]:
    """Returns groups of the module's trainable parameters: weights; and biases with BN scales and offsets, without decay and trust scaling.

    lr_factors: what to multiply the learning rate of a submodule by. Unless that is 1, it gets two groups of its own with that `lr_factor`,
    which the code that sets the groups' `lr` applies.
    """
    apart = {name: factor for name, factor in lr_factors.items() if factor != 1}
    owners = {id(p): name for name in apart for p in module.get_submodule(name).parameters()}
    groups = _two_groups(p for p in module.parameters() if id(p) not in owners)
    for name, factor in apart.items():
        groups += [{**group, "lr_factor": factor} for group in _two_groups(module.get_submodule(name).parameters())]
    return groups


def _two_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    # The official utils/optimizers.py excludes leaves named `b` and parents named `*norm*`: in PyTorch, tensors of at most one dimension.
    trainable = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "adapt": True},
        {"params": [p for p in trainable if p.ndim <= 1], "adapt": False, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
