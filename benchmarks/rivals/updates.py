"""The optimizer step and the target's update of other libraries, each ready to be called repeatedly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.rivals.packages import import_rival
from fastbyol.config.schema import OptimConfig
from fastbyol.optim.build import build_optimizer
from fastbyol.optim.lars import lars_step_reference
from fastbyol.optim.param_groups import byol_param_groups


def solo_learn_update(target: Sequence[Tensor], online: Sequence[Tensor], tau: float) -> None:
    """Updates the target as solo-learn does (solo/utils/momentum.py, MomentumUpdater.update): a new tensor for each parameter, from two
    temporaries.

    Copied from its source, because the package pins other versions of torch and Lightning.
    """
    for op, mp in zip(online, target, strict=True):
        mp.data = tau * mp.data + (1 - tau) * op.data


def lightly_update(target: nn.Module, online: nn.Module, tau: float) -> Callable[[], None]:
    """Returns lightly's update_momentum: two passes over memory. Raises UserError if lightly is not installed."""
    update_momentum = import_rival("lightly.models.utils").update_momentum
    return lambda: update_momentum(online, target, tau)


def ema_pytorch_update(target: nn.Module, online: nn.Module, tau: float, *, use_foreach: bool) -> Callable[[], None]:
    """Returns ema-pytorch's EMA.update with the fixed rate tau from its second call on (the first one copies). Raises UserError if it is
    not installed.

    Args:
        target: the network that follows; buffers are updated too, the package's default.
        online: the network that is followed.
        tau: decay rate.
        use_foreach: the package's option to update all tensors in one call instead of one after another.
    """
    package = import_rival("ema_pytorch")
    # Both bounds of its warm-up are set to tau to keep the rate constant, and it updates at every call.
    ema = package.EMA(online, ema_model=target, beta=tau, min_value=tau, update_after_step=0, update_every=1, use_foreach=use_foreach)
    return ema.update


def torch_optimizer_lars(online: nn.Module, *, lr: float) -> Callable[[], object]:
    """Returns torch-optimizer's LARS.step. Raises UserError if it is not installed."""
    optimizer = build_optimizer(OptimConfig(name="torch_optimizer_lars"), online)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return optimizer.step


def lightly_lars(online: nn.Module, *, lr: float) -> Callable[[], object]:
    """Returns lightly's LARS.step, which scales the layers that have weight decay, as ours does. Raises UserError if lightly is not
    installed.
    """
    lars = import_rival("lightly.utils.lars").LARS
    config = OptimConfig()
    groups = [
        {"params": group["params"], "weight_decay": config.weight_decay if group["adapt"] else 0.0} for group in byol_param_groups(online)
    ]
    return lars(groups, lr=lr, momentum=config.momentum, trust_coefficient=config.trust_coefficient).step


def lars_by_tensor(params: Sequence[Tensor], *, lr: float) -> Callable[[], None]:
    """Returns the LARS rule, one tensor at a time, with its own momentum buffers; needs no package."""
    config = OptimConfig()
    momenta = [torch.zeros_like(param) for param in params]

    def step() -> None:
        for param, buffer in zip(params, momenta, strict=True):
            grad = param.grad
            assert grad is not None
            lars_step_reference(
                param,
                grad,
                buffer,
                lr=lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                trust_coefficient=config.trust_coefficient,
                adapt=param.ndim > 1,
            )

    return step
