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
        if [b.shape for b in self._before] != [p.shape for p in self._parameters]:
            self._before = [torch.empty_like(p) for p in self._parameters]
        torch._foreach_copy_(self._before, self._parameters)

    @torch.no_grad()
    def after_update(self) -> None:
        """After the optimizer. Without `before_update` in this step it does nothing."""
        if not self._parameters:
            return
        torch._foreach_sub_(self._before, self._parameters)
        self.update = global_norm(self._before)
        if self._parameters[0].is_cuda:
            # A GPU's memory is for activations and quickly had again; on the CPU fresh pages cost as much as the copy itself.
            self._before = []
        self._parameters = []

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """The norms of the gradient and of the update since this was last called, None where there were none."""
        taken = self.gradient, self.update
        self.gradient = self.update = None
        return taken


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all numbers in all tensors together, a scalar on their device; 0 for none."""
    if not tensors:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))
