"""The LARS optimizer, computed as in BYOL's official code: all tensors at once, without a host sync, the target's update in the same pass.

Per tensor, in this order (deepmind-research/byol/utils/optimizers.py):
    u = g + weight_decay * w                       unless the group has adapt=False
    u = u * trust_coefficient * |w| / |u|          unless adapt=False; the factor is 1 where either norm is 0
    m = momentum * m + u
    w = w - lr * m
The learning rate stays outside the buffer. Other libraries differ: torch-optimizer, lightly and solo-learn divide by |g| + weight_decay |w|
and skip tensors without gradient; SimCLR keeps the learning rate inside the buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastbyol.config.errors import require
from fastbyol.host.saved_structure import tensor_difference
from fastbyol.optim.ema import TargetUpdate
from fastbyol.optim.memory_order import laid_out_like
from fastbyol.optim.multi_tensor import Update, apply_update

_GROUP = ("lr", "momentum", "weight_decay", "trust_coefficient", "adapt")


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017), by the rule of the official BYOL code.

    No step waits for a GPU. A CUDA graph can hold the step once an eager step has made the buffers; give `lr` as a tensor there, or the
    graph keeps the value it was captured with.

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
        # A tensor is not looked at: that would wait for its device.
        require(isinstance(lr, Tensor) or lr >= 0, "lr", lr, ">= 0")
        require(0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        require(weight_decay >= 0, "weight_decay", weight_decay, ">= 0")
        require(trust_coefficient > 0, "trust_coefficient", trust_coefficient, "> 0")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient, "adapt": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, target_update: TargetUpdate | None = None
    ) -> float | None:
        """Updates every parameter that has a gradient, then the target; gradients keep their values. Returns the closure's loss, if any.

        Online tensors of `target_update` that the optimizer does not update (frozen, or without gradient) pull their target all the same.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # On a CPU in float32 each block of weights has moved its target while it was in cache; what is left follows at the end.
        moved: set[int] = set()
        for group in self.param_groups:
            # Frozen parameters have no gradient; they keep their weights and get no buffer.
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                grads, momenta = [p.grad for p in params if p.grad is not None], [self._momentum_of(p) for p in params]
                moved |= apply_update(Update(params, grads, momenta, **{name: group[name] for name in _GROUP}), target_update)
        if target_update is not None:
            target_update.apply(moved=moved)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of the same parameters. Raises ValueError if the groups differ or a buffer does not have its parameter's shape."""
        params = [param for group in self.param_groups for param in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        if lacking := [name for group in state_dict["param_groups"] for name in _GROUP if name not in group]:
            raise ValueError(f"the saved groups lack {lacking[0]}")
        for number, param in zip(numbers, params, strict=False):  # another number of them is refused below
            kept = state_dict["state"].get(number, {})
            buffer = kept.get("momentum_buffer", param) if isinstance(kept, dict) else None
            if wrong := tensor_difference(buffer, param, f"the momentum buffer of parameter {number}", any_float=True):
                raise ValueError(wrong)
        super().load_state_dict(state_dict)

    def _momentum_of(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        # A checkpoint of a contiguous run, continued channels-last, brings buffers in the other order.
        state["momentum_buffer"] = laid_out_like(param, state["momentum_buffer"])
        return state["momentum_buffer"]


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
    """Updates one tensor, in place, as the rule is written at the top of this file."""
    update = grad.clone()
    if adapt:
        update += weight_decay * param
        weight_norm, update_norm = param.norm().item(), update.norm().item()
        if weight_norm > 0 and update_norm > 0:
            update *= trust_coefficient * weight_norm / update_norm
    momentum_buffer.mul_(momentum).add_(update)
    param.sub_(lr * momentum_buffer)
