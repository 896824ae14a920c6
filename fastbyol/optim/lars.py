"""LARS as BYOL's official code has it, over all tensors at once and without a host sync.

Per tensor, in this order (deepmind-research/byol/utils/optimizers.py):
    u = g + weight_decay * w                       unless the group has adapt=False
    u = u * trust_coefficient * |w| / |u|          unless adapt=False; the factor is 1 where either norm is 0
    m = momentum * m + u
    w = w - lr * m
The learning rate stays outside the buffer. Others differ: torch-optimizer, lightly and solo-learn divide by |g| + weight_decay |w| and skip
tensors without gradient; SimCLR keeps the learning rate inside the buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017) with the official BYOL rule.

    Args:
        params: parameters, or groups; a group with `adapt=False` gets neither decay nor trust scaling.
        lr: learning rate, >= 0 (0 moves the momentum only, as in the first step of a warm-up).
        momentum: in [0, 1).
        weight_decay: >= 0.
        trust_coefficient: eta in the paper, > 0.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
    ) -> None:
        if not isinstance(lr, Tensor) and not lr >= 0:
            raise ValueError(f"lr = {lr}: must be >= 0")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum = {momentum}: must be in [0, 1)")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay = {weight_decay}: must be >= 0")
        if not trust_coefficient > 0:
            raise ValueError(f"trust_coefficient = {trust_coefficient}: must be > 0")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient, "adapt": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; gradients keep their values."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        momenta = [self._momentum_of(p) for p in params]
        torch._foreach_mul_(momenta, group["momentum"])
        if group["adapt"]:
            scales = _trust(params, grads, weight_decay=group["weight_decay"], coefficient=group["trust_coefficient"])
            # m += scale * g + (scale * wd) * w, without a temporary the size of the network
            for m, g, p, scale in zip(momenta, grads, params, scales, strict=True):
                m.addcmul_(g, scale)
                if group["weight_decay"]:
                    m.addcmul_(p, scale * group["weight_decay"])
        else:
            torch._foreach_add_(momenta, grads)
        if isinstance(group["lr"], Tensor):
            for p, m in zip(params, momenta, strict=True):
                p.addcmul_(m, -group["lr"].to(p))
        else:
            torch._foreach_add_(params, momenta, alpha=-group["lr"])

    def _momentum_of(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state["momentum_buffer"]


def _trust(params: list[Tensor], grads: list[Tensor], *, weight_decay: float, coefficient: float) -> tuple[Tensor, ...]:
    """coefficient * |w| / |g + weight_decay * w| per tensor, 1 where either norm is 0; scalars on the device, no sync.

    The update's norm is taken of the update itself, not expanded into products: the expansion cancels for small gradients.
    """
    updates = torch._foreach_add(grads, params, alpha=weight_decay) if weight_decay else grads
    weight_norm = torch.stack(torch._foreach_norm(params))
    update_norm = torch.stack(torch._foreach_norm(updates))
    ratio = coefficient * weight_norm / update_norm
    return torch.where((weight_norm > 0) & (update_norm > 0), ratio, torch.ones_like(ratio)).unbind()


@torch.no_grad()
def lars_step_reference(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    adapt: bool,
) -> None:
    """One tensor's update, in place, as the rule is written at the top of this file."""
    update = grad.clone()
    if adapt:
        update += weight_decay * param
        weight_norm, update_norm = param.norm().item(), update.norm().item()
        if weight_norm > 0 and update_norm > 0:
            update *= trust_coefficient * weight_norm / update_norm
    momentum_buffer.mul_(momentum).add_(update)
    param.sub_(lr * momentum_buffer)
