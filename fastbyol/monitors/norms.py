"""How large a step is: the global norms of the gradient and of the change of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class StepNorms:
    """Norms over all parameters of one step, as tensors on their device: nothing is read here.

    Meant for logged steps only. Every step the two norms would cost three passes over the weights (their copy, the difference, its norm) and one
    over the gradients; on one step of `log_every` they cost that much less, and a norm of one step says as much as a mean of ten.
    """

    def __init__(self) -> None:
        self.gradient: Tensor | None = None
        self.update: Tensor | None = None
        self._parameters: list[Tensor] = []
        self._before: list[Tensor] = []

    @torch.no_grad()
    def before_update(self, parameters: Iterable[Tensor]) -> None:
        """Between the last backward (gradients reduced and unscaled) and the optimizer; parameters without a gradient don't count."""
        self._parameters = [p for p in parameters if p.grad is not None]
        self.gradient = global_norm([p.grad for p in self._parameters if p.grad is not None])
        self._before = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def after_update(self) -> None:
        """After the optimizer. Without `before_update` in this step it does nothing."""
        if self._before:
            torch._foreach_sub_(self._before, self._parameters)
            self.update = global_norm(self._before)
        self._parameters, self._before = [], []


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all numbers in all tensors together, a scalar on their device; 0 for none."""
    if not tensors:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))
