"""Size of an optimizer step: the global norms of the gradient and of the weight change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class StepNorms:
    """Norms over all parameters for one step, as tensors on their device; nothing is read back here.

    Meant for logged steps only. The two norms cost three passes over the weights (copy, difference, norm) and one over the gradients;
    taken only once in `log_every` steps this is cheap, and the norm of one step is as informative as a mean of ten.
    """

    def __init__(self) -> None:
        self.gradient: Tensor | None = None
        self.update: Tensor | None = None
        self._parameters: list[Tensor] = []
        self._before: list[Tensor] = []

    @torch.no_grad()
    def before_update(self, parameters: Iterable[Tensor]) -> None:
        """Records the gradient's norm and copies the weights.

        Call it between the last backward (gradients reduced and unscaled) and the optimizer; parameters without a gradient are ignored.
        """
        self._parameters = [p for p in parameters if p.grad is not None]
        self.gradient = global_norm([p.grad for p in self._parameters if p.grad is not None])
        if [b.shape for b in self._before] != [p.shape for p in self._parameters]:
            self._before = [torch.empty_like(p) for p in self._parameters]
        torch._foreach_copy_(self._before, self._parameters)

    @torch.no_grad()
    def after_update(self) -> None:
        """Computes the norm of the weight change. Call it after the optimizer; does nothing unless `before_update` was called in this
        step.
        """
        if not self._parameters:
            return
        torch._foreach_sub_(self._before, self._parameters)
        self.update = global_norm(self._before)
        if self._parameters[0].is_cuda:
            # On a GPU memory is scarce and quick to allocate; on the CPU allocating fresh pages costs as much as the copy, so keep them.
            self._before = []
        self._parameters = []

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """Returns the norms of the gradient and of the update since the last call, or None for each that was not taken."""
        taken = self.gradient, self.update
        self.gradient = self.update = None
        return taken


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the 2-norm over all elements of all tensors as a scalar on their device; 0 for no tensors."""
    if not tensors:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))
