"""The ways of updating the networks after a backward, ours and other libraries', each ready to be called repeatedly.

The cases and parts `ema`, `lars` and `fused_update` compare them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals import import_rival
from fastbyol.byol import Target, build_byol
from fastbyol.config.schema import ModelConfig, OptimConfig
from fastbyol.optim.build import build_optimizer
from fastbyol.optim.ema import ema_update
from fastbyol.optim.lars import lars_step_reference
from fastbyol.optim.param_groups import byol_param_groups

LR, TAU = 1e-3, 0.99
"""Thousands of updates with so small a learning rate change little; their cost does not depend on it."""
CPU = torch.device("cpu")
CEILING, RIVAL, BY_TENSOR = "copy_", "torch-optimizer LARS", "the rule, a tensor at a time"
"""Rows of both the cases and the parts."""


def target_title(target: Sequence[Tensor]) -> str:
    return f"the target's update, {_size_of(target)}"


def lars_title(updates: OnlineUpdates) -> str:
    return f"one LARS step, {_size_of(updates.params)}"


def _size_of(tensors: Sequence[Tensor]) -> str:
    return f"{sum(tensor.numel() for tensor in tensors) / 1e6:.1f} M parameters in {len(tensors)} tensors"


def target_and_online(model: ModelConfig, *, device: torch.device = CPU) -> tuple[nn.Module, nn.Module]:
    """Returns the target, and the online network's encoder and projector with parameters that are larger by 0.01."""
    byol = build_byol(model, num_classes=2).to(device)
    followed = Target(byol.online)  # the same two parts, as one module
    with torch.no_grad():
        for parameter in followed.parameters():
            parameter.add_(0.01)  # they start equal, and an update between equal networks changes nothing
    return byol.target, followed


class OnlineUpdates:
    """Networks whose online part has gradients, and the ways of updating it, with or without the target.

    Every optimizer has momentum buffers of its own; all of them update the same parameters.
    """

    def __init__(self, model: ModelConfig, *, device: torch.device = CPU, layout: torch.memory_format = torch.contiguous_format) -> None:
        self.byol = build_byol(model, num_classes=2).to(device).to(memory_format=layout)  # type: ignore[call-overload]
        self.params = [p for p in self.byol.online.parameters() if p.requires_grad]
        generator = torch.Generator(device).manual_seed(0)
        for param in self.params:
            # A backward leaves a gradient in its parameter's memory layout; another one would make every update gather.
            order = layout if param.ndim == 4 else torch.contiguous_format
            param.grad = 1e-3 * torch.randn(param.shape, generator=generator, device=device).contiguous(memory_format=order)
        self.target = [p.detach() for p in self.byol.target.parameters()]
        self.online = [p.detach() for module in (self.byol.online.encoder, self.byol.online.projector) for p in module.parameters()]

    def copy(self) -> Callable[[], object]:
        """Returns the ceiling: `copy_` of the online network's parameters."""
        source = [p.detach() for p in self.params]
        copies = [torch.zeros_like(p) for p in source]
        return lambda: torch._foreach_copy_(copies, source)

    def optimizer(self, name: str = "lars", *, lr: float | Tensor = LR) -> Any:
        """Returns the optimizer of that `optim.name`. Raises UserError if its library is not installed."""
        optimizer = build_optimizer(OptimConfig(name=name), self.byol.online)
        for group in optimizer.param_groups:
            group["lr"] = lr
        return optimizer

    def lars_with_target(self) -> Callable[[], object]:
        """Returns the call of `train_step`, which updates both networks."""
        optimizer = self.optimizer()
        return lambda: optimizer.step(target_update=self.byol.target_update(TAU))

    def lars_then_target(self) -> Callable[[], object]:
        """Returns our two updates, one after the other."""
        return in_order(self.optimizer().step, lambda: ema_update(self.target, self.online, TAU))

    def solo_learn_after(self, step: Callable[[], object]) -> Callable[[], None]:
        """Returns the step followed by solo-learn's update of the target."""
        return in_order(step, lambda: solo_learn_update(self.target, self.online, TAU))

    def lightly(self) -> Callable[[], None]:
        """Returns lightly's LARS and its update of the target. Raises UserError if lightly is not installed."""
        pairs = (self.byol.target.encoder, self.byol.online.encoder), (self.byol.target.projector, self.byol.online.projector)
        return in_order(lightly_lars(self.byol.online, lr=LR), *(lightly_update(*pair, TAU) for pair in pairs))


def in_order(*steps: Callable[[], object]) -> Callable[[], None]:
    """Returns a function that runs all steps, one after another."""

    def run() -> None:
        for step in steps:
            step()

    return run


def solo_learn_update(target: Sequence[Tensor], online: Sequence[Tensor], tau: float) -> None:
    """Updates the target as solo-learn does (solo/utils/momentum.py, MomentumUpdater.update): each parameter anew, from two temporaries."""
    # Copied from its source, because the package pins other versions of torch and Lightning.
    for op, mp in zip(online, target, strict=True):
        mp.data = tau * mp.data + (1 - tau) * op.data


def foreach_update(target: nn.Module, online: nn.Module, tau: float) -> Callable[[], None]:
    """Returns the equation for all tensors at once: a product and a sum, two passes over memory."""
    # The tensors are looked up once, not at every call.
    targets, onlines = ([parameter.detach() for parameter in network.parameters()] for network in (target, online))

    def update() -> None:
        torch._foreach_mul_(targets, tau)
        torch._foreach_add_(targets, onlines, alpha=1 - tau)

    return update


def averaged_model_update(target: nn.Module, online: nn.Module, tau: float) -> Callable[[], None]:
    """Returns the update of torch's AveragedModel (swa_utils) with its multi_avg function for EMA, which takes all tensors at once."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    averaged = AveragedModel(online, multi_avg_fn=get_ema_multi_avg_fn(tau))
    averaged.module = target  # so that all subjects move the same tensors
    averaged.n_averaged.fill_(1)  # the first update would copy

    return lambda: averaged.update_parameters(online)


def lightly_update(target: nn.Module, online: nn.Module, tau: float) -> Callable[[], None]:
    """Returns lightly's update_momentum: two passes over memory. Raises UserError if lightly is not installed."""
    update_momentum = import_rival("lightly.models.utils").update_momentum
    return lambda: update_momentum(online, target, tau)


def ema_pytorch_update(target: nn.Module, online: nn.Module, tau: float, *, use_foreach: bool) -> Callable[[], None]:
    """Returns ema-pytorch's EMA.update with the fixed rate tau from its second call on (the first one copies); buffers are updated too,
    its default. use_foreach: its option to update all tensors in one call. Raises UserError if it is not installed.
    """
    package = import_rival("ema_pytorch")
    # Both bounds of its warm-up are set to tau to keep the rate constant, and it updates at every call.
    ema = package.EMA(online, ema_model=target, beta=tau, min_value=tau, update_after_step=0, update_every=1, use_foreach=use_foreach)
    return ema.update


def lightly_lars(online: nn.Module, *, lr: float) -> Callable[[], object]:
    """Returns lightly's LARS.step, which scales the layers that have weight decay, as ours does. Raises UserError without lightly."""
    lars = import_rival("lightly.utils.lars").LARS
    config = OptimConfig()
    groups = [
        {"params": group["params"], "weight_decay": config.weight_decay if group["adapt"] else 0.0} for group in byol_param_groups(online)
    ]
    return lars(groups, lr=lr, momentum=config.momentum, trust_coefficient=config.trust_coefficient).step


def lars_by_tensor(params: Sequence[Tensor], *, lr: float) -> Callable[[], None]:
    """Returns the LARS rule, one tensor at a time, with its own momentum buffers; needs no package."""
    config = OptimConfig()
    rates = {name: getattr(config, name) for name in ("momentum", "weight_decay", "trust_coefficient")}
    momenta = [torch.zeros_like(param) for param in params]

    def step() -> None:
        for param, buffer in zip(params, momenta, strict=True):
            assert param.grad is not None
            lars_step_reference(param, param.grad, buffer, lr=lr, adapt=param.ndim > 1, **rates)

    return step
