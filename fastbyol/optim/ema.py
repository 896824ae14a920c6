"""Moves the target: a moving average of the online parameters, over all tensors at once."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbyol.config.errors import UserError, first_line, require_choice
from fastbyol.config.schema import UPDATES
from fastbyol.optim.memory_order import is_dense, same_order

APEX_CHUNK = 2048 * 32
"""Elements per block of threads: apex's own choice in multi_tensor_apply."""

TRIED_NUMBERS = 5000
"""More than one chunk of Triton's kernel, and not a multiple of it."""


@dataclass(frozen=True)
class TargetUpdate:
    """Says which tensors follow which, and how far: target <- target + (1 - tau) (online - target), in place (Grill et al., equation 1).

    Args:
        target, online: tensors of equal shapes in equal order. Targets are float32 or float64: (1 - tau) falls to 1e-13 at the end of a
            run, which a bf16 target would swallow.
        tau: target decay rate in [0, 1]; a tensor on the device is never read on the host, and a CUDA graph follows its value.
        backend: one of `UPDATES`. 'foreach' and 'auto' (any device): torch's operations over all tensors, and where 'auto' goes with a
            LARS step on a CPU, our kernel that moves a target while its parameter is in cache. 'triton' (float32 on CUDA): one launch for
            all tensors, tau a tensor or not. 'apex' (NVIDIA's amp_C, float32 on CUDA, tau a number): written from its source, run
            against a stand-in only.

    Raises:
        UserError: the backend is unknown.
        ValueError: the lists differ in length, or two tensors in shape or device.
    """

    target: Sequence[Tensor]
    online: Sequence[Tensor]
    tau: float | Tensor
    backend: str = "auto"

    def __post_init__(self) -> None:
        require_choice("optim.update", self.backend, UPDATES)
        if len(self.target) != len(self.online):
            raise ValueError(f"the update got {len(self.target)} target and {len(self.online)} online tensors; both lists must match")
        for t, o in zip(self.target, self.online, strict=True):
            if t.shape != o.shape or t.device != o.device:
                raise ValueError(
                    f"the update got a target of {tuple(t.shape)} on {t.device} and {tuple(o.shape)} on {o.device} online; must be alike"
                )

    @torch.no_grad()
    def apply(self, *, moved: Collection[int] = frozenset()) -> None:
        """Moves every target but those whose online tensor's id is in `moved`: a kernel has moved them already."""
        pairs = [(t, o) for t, o in zip(self.target, self.online, strict=True) if id(o) not in moved]
        if not pairs:
            return
        target, online = [t for t, _ in pairs], [o for _, o in pairs]
        if self.backend == "triton":
            _triton_lerp_(target, online, 1 - self.tau)
        elif self.backend == "apex":
            _apex_lerp_(target, online, self.tau)
        else:
            _foreach_lerp_(target, online, 1 - self.tau)


def ema_update(target: Sequence[Tensor], online: Sequence[Tensor], tau: float | Tensor, *, backend: str = "auto") -> None:
    """Moves the target towards the online tensors, in place, in one pass over memory; see `TargetUpdate` for arguments and errors.

    Call it after the optimizer's step, on parameters only: BN statistics are each network's own.
    """
    TargetUpdate(target, online, tau, backend).apply()


@torch.no_grad()
def ema_update_reference(target: Sequence[Tensor], online: Sequence[Tensor], tau: float) -> None:
    """Does the same as `ema_update`, one tensor after another, as the equation is written."""
    for t, o in zip(target, online, strict=True):
        t.copy_(tau * t + (1 - tau) * o)


def check_update(backend: str, device: torch.device) -> None:
    """Tries the backend on a small tensor of the device, so that UserError says what it lacks before a run and not in its first step."""
    require_choice("optim.update", backend, UPDATES)
    if backend == "apex" and device.type != "cuda":
        raise UserError(f"optim.update = 'apex': needs a GPU, and the device is {device}; take auto")
    target, online = torch.zeros(TRIED_NUMBERS, device=device), torch.ones(TRIED_NUMBERS, device=device)
    try:
        ema_update([target], [online], 0.75, backend=backend)
        right = bool((target == 0.25).all())
    except UserError:
        raise
    except Exception as error:  # a compiler's or a driver's: each has classes of its own
        raise UserError(f"optim.update = {backend!r}: does not work on {device} ({first_line(error, limit=200)}); take auto") from error
    if not right:
        raise UserError(f"optim.update = {backend!r}: computes a wrong average on {device}; take auto")


@contextmanager
def one_thread_on_cpu(device: torch.device) -> Iterator[None]:
    """Context in which torch's CPU operations run on the calling thread; no effect for another device."""
    # An update is limited by memory, which one core nearly saturates, while every tensor's parallel region waits at a barrier of its own:
    # with the other core busy the same updates took two to four times the CPU time on two threads.
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _foreach_lerp_(target: list[Tensor], online: list[Tensor], weight: float | Tensor) -> None:
    with one_thread_on_cpu(target[0].device):
        # torch's fused form takes a number only: handed a tensor, it reads it on the host and so waits for the device.
        if isinstance(weight, Tensor) and target[0].device.type != "cpu":
            weight = weight.to(target[0])
            for t, o in zip(target, online, strict=True):
                t.lerp_(o, weight)
        else:
            torch._foreach_lerp_(target, online, float(weight))


def _triton_lerp_(target: list[Tensor], online: list[Tensor], weight: float | Tensor) -> None:
    try:
        from fastbyol.optim.triton_lerp import multi_tensor_lerp_
    except ImportError as error:
        raise UserError(
            "optim.update = 'triton': triton is not installed; take a CUDA build of torch, which brings it, or 'foreach'"
        ) from error
    multi_tensor_lerp_(target, online, weight)


def _apex_lerp_(target: list[Tensor], online: list[Tensor], tau: float | Tensor) -> None:
    try:
        amp_c = importlib.import_module("amp_C")
    except ImportError as error:
        raise UserError(
            "optim.update = 'apex': NVIDIA's apex with its CUDA extensions is not installed (no module amp_C; PyPI's package of that name is a "
            "web toolkit); build it from github.com/NVIDIA/apex, or take 'foreach'"
        ) from error
    for t, o in zip(target, online, strict=True):  # amp_C looks at the first list's sizes only
        if t.dtype != o.dtype or not (is_dense(t) and same_order(t, o)):
            raise UserError(
                f"optim.update = 'apex': a target of {tuple(t.shape)} must be dense and laid out as online, in its dtype; take 'foreach'"
            )
    if isinstance(tau, Tensor):
        raise UserError("optim.update = 'apex': tau is a tensor, and amp_C takes a number; pass a float, or take 'foreach' or 'triton'")
    overflow = torch.zeros(1, dtype=torch.int32, device=target[0].device)  # amp_C marks inputs that are not finite; not read here
    amp_c.multi_tensor_axpby(APEX_CHUNK, overflow, [target, online, target], tau, 1 - tau, -1)
