"""Finds the step at which a run stopped being finite, without reading from the device until someone asks.

One image of NaN poisons all batch-norm statistics in the forward pass, before any weight changes, and skipping the update would not
repair them. So no update is skipped: the run ends, and a non-finite state is never saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FiniteCheck:
    """Counts the forward passes with a finite loss, up to the first that is not; a step consists of `forwards_per_step`."""

    def __init__(self, *, forwards_per_step: int = 1) -> None:
        self.forwards_per_step = forwards_per_step
        self._alive: Tensor | None = None
        self._finite_forwards: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        """Adds the loss of one forward pass, a scalar on any device; a non-finite input makes the loss non-finite."""
        finite = torch.isfinite(loss.detach())
        # Made by the first loss, on its device. Both counters stay there: reading them in every step would make the host wait.
        if self._alive is None or self._finite_forwards is None:
            self._alive, self._finite_forwards = torch.ones_like(finite), torch.zeros_like(finite, dtype=torch.int64)
        self._alive &= finite
        self._finite_forwards += self._alive

    def first_bad_step(self) -> int | None:
        """Returns how many steps were finite before the first that was not, or None if all were. Waits for the device."""
        if self._alive is None or self._finite_forwards is None or self._alive.item():
            return None
        return int(self._finite_forwards.item()) // self.forwards_per_step


def first_not_finite(state: Any, where: str = "") -> str | None:
    """Returns the name of the first tensor in nested dicts and lists that holds NaN or infinity, or None."""
    if isinstance(state, Tensor):
        # NaN and infinity show in the minimum and maximum: one pass without temporaries, a tenth of isfinite's time on the CPU.
        counts = state.is_floating_point() and state.numel() > 0
        return where if counts and not bool(torch.isfinite(torch.stack(torch.aminmax(state))).all()) else None
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    for key, value in items:
        if found := first_not_finite(value, f"{where}.{key}" if where else str(key)):
            return found
    return None
