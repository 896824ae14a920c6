"""Builds the optimizer that a config names."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastbyol.config.errors import UserError
from fastbyol.config.plain import nearest_name
from fastbyol.config.schema import OptimConfig
from fastbyol.optim.ema import TargetUpdate
from fastbyol.optim.lars import LARS
from fastbyol.optim.param_groups import byol_param_groups

TIMM_PREFIX = "timm_"


def build_optimizer(config: OptimConfig, module: nn.Module) -> Optimizer:
    """Returns an optimizer over the module's trainable parameters, whose `step` takes LARS's `target_update`.

    Its learning rate is 0 until the schedule sets it, times a group's `lr_factor`. Raises UserError if the library that the name needs is
    not installed or has no such optimizer.
    """
    factors = {"online.projector": config.projector_lr_factor, "online.predictor": config.predictor_lr_factor}
    groups = byol_param_groups(module, lr_factors=factors)
    if config.name == "lars":
        return LARS(groups, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay, trust_coefficient=config.trust_coefficient)
    optimizer = _other_optimizer(config, groups)
    # The target moves inside the step, because a gradient scaler silently skips a step that has overflowed: outside the step, the target
    # would move alone.
    optimizer.step = MethodType(_step_and_target, optimizer)  # type: ignore[method-assign]
    return optimizer


def _other_optimizer(config: OptimConfig, groups: list[dict[str, Any]]) -> Optimizer:
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=config.weight_decay)
    if config.name.startswith(TIMM_PREFIX):
        return _timm_optimizer(config, groups)
    return _torch_optimizer_lars(config, groups)


def _step_and_target(optimizer: Optimizer, *, target_update: TargetUpdate | None = None) -> None:
    type(optimizer).step(optimizer)
    if target_update is not None:
        target_update.apply()


def _torch_optimizer_lars(config: OptimConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """Returns torch-optimizer's LARS, for comparison.

    Differs from the paper: it divides by |g| + wd |w| + 1e-8, and skips tensors whose gradient is 0.
    """
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


def _timm_optimizer(config: OptimConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """Returns timm's optimizer of that name. Biases and BN get no decay, so its LARS (timm_lars) adapts weights only.

    Differs from the paper: timm's LARS divides by |g| + wd |w|, as torch-optimizer's does.
    """
    name = config.name.removeprefix(TIMM_PREFIX)
    try:
        import timm
        import timm.optim
    except ImportError as error:
        raise UserError(f"optim.name = {config.name!r}: timm is not installed; pip install 'fastbyol[timm]'") from error
    known = [str(each) for each in timm.optim.list_optimizers()]
    if name not in known:
        near = nearest_name(config.name, [TIMM_PREFIX + each for each in known])
        raise UserError(f"optim.name = {config.name!r}: timm {timm.__version__} has no such optimizer{near}")
    # Other optimizers refuse the argument.
    trust: dict[str, Any] = {"trust_coeff": config.trust_coefficient} if name in ("lars", "larc", "nlars", "nlarc") else {}
    try:
        return timm.optim.create_optimizer_v2(groups, opt=name, lr=0.0, weight_decay=config.weight_decay, momentum=config.momentum, **trust)
    except (ValueError, AssertionError, RuntimeError, ImportError) as error:  # CUDA or another package is missing, or it takes no schedule
        raise UserError(f"optim.name = {config.name!r}: timm {timm.__version__} cannot make it ({error}); choose another") from error
