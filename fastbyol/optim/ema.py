"""The target's update: a moving average of the online parameters, fused over all tensors."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fastbyol.config.errors import UserError, require_choice
from fastbyol.optim.memory_order import is_dense, same_order
from fastbyol.optim.multi_tensor import lerp_

EMA_BACKENDS = ("foreach", "triton", "apex")


@torch.no_grad()
def ema_update(target: Sequence[Tensor], online: Sequence[Tensor], tau: float | Tensor, *, backend: str = "foreach") -> None:
    """target <- target + (1 - tau) (online - target), in place, one pass over memory (Grill et al., equation 1).

    Call it after the optimizer's step, on parameters only: BN statistics are each network's own.

    Args:
        target, online: tensors of equal shapes in equal order. Targets are float32 or float64: (1 - tau) falls to 1e-13 at the end of a
            run, which a bf16 target would swallow.
        tau: target decay rate in [0, 1]; a tensor on the device is never read on the host, and a CUDA graph follows its value.
        backend: 'foreach' (any device), 'triton' (float32 on CUDA: one launch for all tensors, tau a tensor or not), or 'apex' (NVIDIA's
            amp_C, float32 on CUDA, tau a number; written from its source, run against a stand-in only).

    Raises:
        UserError: the backend is unknown, or what it needs is missing.
        ValueError: the lists differ in length, or two tensors in shape or device.
    """
    require_choice("backend", backend, EMA_BACKENDS)
    if len(target) != len(online):
        raise ValueError(f"ema_update got {len(target)} target and {len(online)} online tensors; both lists must match")
    for t, o in zip(target, online, strict=True):
        if t.shape != o.shape or t.device != o.device:
            raise ValueError(
                f"ema_update got a target of {tuple(t.shape)} on {t.device} and {tuple(o.shape)} on {o.device} online; must be alike"
            )
    if backend == "triton":
        _triton_lerp(target, online, 1 - tau)
    elif backend == "apex":
        _apex_lerp(target, online, tau)
    else:
        lerp_(target, online, 1 - tau)


@torch.no_grad()
def ema_update_reference(target: Sequence[Tensor], online: Sequence[Tensor], tau: float) -> None:
    """The same, a tensor at a time as the equation is written."""
    for t, o in zip(target, online, strict=True):
        t.copy_(tau * t + (1 - tau) * o)


def _triton_lerp(target: Sequence[Tensor], online: Sequence[Tensor], weight: float | Tensor) -> None:
    try:
        from fastbyol.optim.triton_lerp import multi_tensor_lerp_
    except ImportError as error:
        raise UserError("backend = 'triton': triton is not installed; take a CUDA build of torch, which brings it, or 'foreach'") from error
    multi_tensor_lerp_(target, online, weight)


def _apex_lerp(target: Sequence[Tensor], online: Sequence[Tensor], tau: float | Tensor) -> None:
    try:
        amp_c = importlib.import_module("amp_C")
    except ImportError as error:
        raise UserError(
            "backend = 'apex': NVIDIA's apex with its CUDA extensions is not installed (no module amp_C; PyPI's package of that name is a "
            "web toolkit); build it from github.com/NVIDIA/apex, or take 'foreach'"
        ) from error
    for t, o in zip(target, online, strict=True):  # amp_C looks at the first list's sizes only
        if t.dtype != o.dtype or not (is_dense(t) and same_order(t, o)):
            raise UserError(
                f"backend = 'apex': a target of {tuple(t.shape)} must be dense and laid out as online, in its dtype; take 'foreach'"
            )
    if isinstance(tau, Tensor):
        raise UserError("backend = 'apex': tau is a tensor, and amp_C takes a number; pass a float, or take 'foreach' or 'triton'")
    overflow = torch.zeros(1, dtype=torch.int32, device=target[0].device)  # amp_C writes it where its third argument asks; -1 asks nowhere
    chunk = 2048 * 32  # apex's own choice in multi_tensor_apply
    amp_c.multi_tensor_axpby(chunk, overflow, [list(target), list(online), list(target)], tau, 1 - tau, -1)
