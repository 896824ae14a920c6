"""Applies a LARS update to many tensors: with the fewest passes over memory on a CPU in float32, with few launches and no sync elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.host.compile_cache import njit
from fastbyol.host.kernel_threads import in_threads
from fastbyol.optim.ema import TargetUpdate, one_thread_on_cpu
from fastbyol.optim.memory_order import laid_out_like, same_order

F32 = NDArray[np.float32]
_RUN = 8192  # elements summed in float32 before they join a float64 sum


@njit(fastmath={"reassoc", "contract"}, cache=True, nogil=True)
def _squares(w: F32, g: F32, decay: np.float32) -> tuple[np.float32, np.float32]:
    ww, uu = np.float32(0), np.float32(0)
    for i in range(w.size):
        u = g[i] + decay * w[i]
        ww += w[i] * w[i]
        uu += u * u
    return ww, uu


@njit(cache=True, nogil=True)
def trust_ratio(w: F32, g: F32, decay: np.float32, coefficient: float) -> float:
    """Returns coefficient * |w| / |g + decay * w|, or 1 where either norm is 0; w, g (N,) contiguous."""
    ww, uu = 0.0, 0.0
    for start in range(0, w.size, _RUN):
        a, b = _squares(w[start : start + _RUN], g[start : start + _RUN], decay)
        ww += a
        uu += b
    return coefficient * math.sqrt(ww / uu) if ww > 0 and uu > 0 else 1.0


@njit(fastmath={"contract"}, cache=True, nogil=True)
def step_block(w: F32, g: F32, m: F32, scale: np.float32, decay: np.float32, momentum: np.float32, lr: np.float32) -> None:
    """Sets m = momentum * m + scale * (g + decay * w), then w -= lr * m, in place."""
    for i in range(w.size):
        v = momentum * m[i] + scale * (g[i] + decay * w[i])
        m[i] = v
        w[i] -= lr * v


@njit(fastmath={"contract"}, cache=True, nogil=True)
def step_block_with_target(
    w: F32, g: F32, m: F32, t: F32, scale: np.float32, decay: np.float32, momentum: np.float32, lr: np.float32, weight: np.float32
) -> None:
    """Does the same as `step_block`, then sets t += weight * (w - t)."""
    for i in range(w.size):
        v = momentum * m[i] + scale * (g[i] + decay * w[i])
        m[i] = v
        x = w[i] - lr * v
        w[i] = x
        t[i] += weight * (x - t[i])


# Elements: w, g, m and the target of one block stay in a 32 MiB last-level cache.
BLOCK = 1 << 19


@dataclass(frozen=True)
class Update:
    """One group's parameters with their gradients, momenta and settings; the lists have the same order."""

    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]
    lr: float | Tensor
    momentum: float
    adapt: bool
    weight_decay: float
    trust_coefficient: float


def apply_update(update: Update, target_update: TargetUpdate | None) -> frozenset[int]:
    """Moves momenta and parameters, in place, and on a CPU in float32 the targets of adapted parameters in the same pass.

    Returns the ids of the parameters whose target has moved. Raises ValueError if shapes, dtypes, devices or layouts do not pair.
    """
    # A gradient may have any memory order and is copied if need be. A momentum is not: the update of a copy would be lost.
    update = replace(update, grads=[laid_out_like(p, g) for p, g in zip(update.params, update.grads, strict=True)])
    for p, m in zip(update.params, update.momenta, strict=True):
        if laid_out_like(p, m) is not m:
            raise ValueError(f"a momentum buffer with strides {m.stride()} beside a parameter with {p.stride()}: must be laid out alike")
    if update.adapt and (target_update is None or target_update.backend == "auto"):
        followers = {id(o): t for t, o in zip(target_update.target, target_update.online, strict=True)} if target_update else {}
        targets = [followers.get(id(p)) for p in update.params]
        if all(_fits_blocks(*pair) for pair in zip(update.params, targets, strict=True)):
            _apply_in_blocks(update, targets, 1 - float(target_update.tau) if target_update else 0.0)
            return frozenset(id(p) for p, t in zip(update.params, targets, strict=True) if t is not None)
    with one_thread_on_cpu(update.params[0].device):
        _apply_at_once(update)
    return frozenset()


def _apply_at_once(update: Update) -> None:
    """Takes a few launches for all tensors: one for the decayed gradients (a temporary), their norms, the update."""
    grads = _scaled(update) if update.adapt else update.grads
    lr, device = update.lr, update.params[0].device
    if isinstance(lr, Tensor):
        # The forms that the fused kernel takes without a sync: a number on the CPU, a float32 tensor on a device.
        lr = lr.item() if device.type == "cpu" else lr.to(device, torch.float32, non_blocking=True)
    torch._fused_sgd_(
        update.params,
        grads,
        update.momenta,
        weight_decay=0.0,
        # The kernel refuses a buffer where momentum is 0, so it gets the smallest positive number instead.
        momentum=update.momentum or math.ulp(0.0),
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def _apply_in_blocks(update: Update, targets: list[Tensor | None], weight: float) -> None:
    """Computes a tensor's norms and at once its update and its target's, while part of w and g is in cache; one tensor per thread."""
    lr, momentum, decay = (np.float32(x) for x in (float(update.lr), update.momentum, update.weight_decay))

    def apply(tensors: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
        *ours, t = tensors
        w, x, buffer = map(_flat, ours)
        scale = np.float32(trust_ratio(w, x, decay, update.trust_coefficient))
        for start in reversed(range(0, w.size, BLOCK)):  # backwards: the last elements read are the likeliest in cache
            part = slice(start, start + BLOCK)
            if t is None:
                step_block(w[part], x[part], buffer[part], scale, decay, momentum, lr)
            else:
                follower = _flat(t)[part]
                step_block_with_target(w[part], x[part], buffer[part], follower, scale, decay, momentum, lr, np.float32(weight))

    # Largest first, so that no thread starts on the largest tensor when the others are nearly done.
    largest_first = sorted(zip(update.params, update.grads, update.momenta, targets, strict=True), key=lambda tensors: -tensors[0].numel())
    in_threads(apply, largest_first)


def _scaled(update: Update) -> list[Tensor]:
    """Returns u * trust_coefficient * |w| / |u| for u = g + weight_decay * w; the ratios stay on the device."""
    u = torch._foreach_add(update.grads, update.params, alpha=update.weight_decay)
    weight_norm = torch.stack(torch._foreach_norm(update.params))
    update_norm = torch.stack(torch._foreach_norm(u))
    ratio = update.trust_coefficient * weight_norm / update_norm
    # A tensor of zeros, or one without gradient, would divide by zero; the official code leaves such an update unscaled.
    ratio = torch.where((weight_norm > 0) & (update_norm > 0), ratio, torch.ones_like(ratio))
    torch._foreach_mul_(u, ratio.unbind())
    return list(u)


def _flat(tensor: Tensor) -> NDArray[np.float32]:
    """Returns the memory of a dense tensor as an array of one dimension."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).numpy()


def _fits_blocks(param: Tensor, target: Tensor | None) -> bool:
    """Says whether the CPU kernel can take them: float32, and in the same memory order. Everything else takes `_apply_at_once`."""
    on_cpu = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (param, target) if x is not None)
    return on_cpu and (target is None or same_order(param, target))
