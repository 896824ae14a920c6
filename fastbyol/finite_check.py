"""Finds the step at which a run stopped being finite, without reading from the device before somebody asks.

One image of NaN poisons every BN statistic in the forward pass, before any weight moves, and skipping the update would not heal them: so
nothing is skipped, the run ends, and no state that is not finite is ever saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FiniteCheck:
    """Counts the forwards whose loss was finite, up to the first that was not.

    Args:
        forwards_per_step: micro-batches of an optimizer step.
    """

    def __init__(self, *, forwards_per_step: int = 1) -> None:
        self.forwards_per_step = forwards_per_step
        self._alive: Tensor | None = None
        self._finite_forwards: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        """One forward's loss, a scalar on any device; a non-finite input makes it non-finite."""
        finite = torch.isfinite(loss.detach())
        if self._alive is None or self._finite_forwards is None:
            self._alive, self._finite_forwards = torch.ones_like(finite), torch.zeros_like(finite, dtype=torch.int64)
        self._alive &= finite
        self._finite_forwards += self._alive

    def first_bad_step(self) -> int | None:
        """Steps that were finite before the first that was not, counted from the first `add`; None if all were. Waits for the device."""
        if self._alive is None or self._finite_forwards is None or self._alive.item():
            return None
        return int(self._finite_forwards.item()) // self.forwards_per_step


def first_not_finite(state: Any, where: str = "") -> str | None:
    """The name of the first tensor in nested dicts and lists that holds NaN or infinity, or None."""
    if isinstance(state, Tensor):
        # Minimum and maximum keep NaN and infinity: one pass without temporaries, a tenth of isfinite's time on the CPU.
        counts = state.is_floating_point() and state.numel() > 0
        return where if counts and not bool(torch.isfinite(torch.stack(torch.aminmax(state))).all()) else None
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    for key, value in items:
        if found := first_not_finite(value, f"{where}.{key}" if where else str(key)):
            return found
    return None
