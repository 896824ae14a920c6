"""The optimizer's step and the target's update as other libraries do them, each ready to be called again and again."""

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
    """solo-learn, solo/utils/momentum.py, MomentumUpdater.update: a new tensor for each parameter, from two temporaries.

    Copied from its source: the package pins versions of torch and Lightning that are not ours.
    """
    for op, mp in zip(online, target, strict=True):
        mp.data = tau * mp.data + (1 - tau) * op.data


def lightly_update(target: nn.Module, online: nn.Module, tau: float) -> Callable[[], None]:
    """lightly's update_momentum: two passes over memory. UserError where lightly is not installed."""
    update_momentum = import_rival("lightly.models.utils").update_momentum
    return lambda: update_momentum(online, target, tau)


def ema_pytorch_update(target: nn.Module, online: nn.Module, tau: float, *, use_foreach: bool) -> Callable[[], None]:
    """ema-pytorch's EMA.update, at the fixed rate tau from its second call on (the first copies). UserError where it is not installed.

    Args:
        target: what follows; the buffers too, as that package does by default.
        online: what is followed.
        tau: decay rate.
        use_foreach: its own option: all tensors in one call instead of one after another.
    """
    package = import_rival("ema_pytorch")
    # Its warm-up of the rate is held at tau from both sides, and it is asked to update at every call.
    ema = package.EMA(online, ema_model=target, beta=tau, min_value=tau, update_after_step=0, update_every=1, use_foreach=use_foreach)
    return ema.update


def torch_optimizer_lars(online: nn.Module, *, lr: float) -> Callable[[], object]:
    """torch-optimizer's LARS.step. UserError where it is not installed."""
    optimizer = build_optimizer(OptimConfig(name="torch_optimizer_lars"), online)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return optimizer.step


def lightly_lars(online: nn.Module, *, lr: float) -> Callable[[], object]:
    """lightly's LARS.step, which scales by layer what has weight decay, as ours does. UserError where lightly is not installed."""
    lars = import_rival("lightly.utils.lars").LARS
    config = OptimConfig()
    groups = [
        {"params": group["params"], "weight_decay": config.weight_decay if group["adapt"] else 0.0} for group in byol_param_groups(online)
    ]
    return lars(groups, lr=lr, momentum=config.momentum, trust_coefficient=config.trust_coefficient).step


def lars_by_tensor(params: Sequence[Tensor], *, lr: float) -> Callable[[], None]:
    """The rule, a tensor at a time, with momenta of its own: needs no package."""
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
