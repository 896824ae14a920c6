"""Batch norm for a batch that holds both views: each view gets its own statistics, as if it were a batch of its own.

The official code runs each view through the network separately. One batch for both halves the number of calls, weight casts and
messages and gives the convolutions more work at a time. The result is the same as long as no statistic covers more than one view.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastbyol.models.cpu_norm import fits_cpu, normalise_on_cpu
from fastbyol.models.cuda_norm import fits_cuda, normalise_on_cuda
from fastbyol.models.sync_batchnorm import Normalised, cross_replica_normalise

Norm = TypeVar("Norm", bound=_BatchNorm)


class ViewBatchNorm(_BatchNorm):
    """nn.BatchNorm1d/2d with statistics per view, over all ranks if asked; same parameters, buffers and state dict.

    In training the input is (views * N, C, ...), one view after the other, and the running statistics are updated with the views in
    that order. In evaluation it is plain batch norm. It must not subclass nn.SyncBatchNorm: DDP refuses that class on the CPU.
    """

    def __init__(self, num_features: int, *, views: int = 1, across_ranks: bool = False, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.views, self.across_ranks = views, across_ranks
        # Name of the process group whose ranks share their statistics; '' means all ranks.
        self.group = ""
        # Dropout and activation of a layer that also activates (timm's BatchNormAct2d).
        self.activation: nn.Sequential | None = None
        # The class to which `convert_to_batchnorm` converts it back.
        self.plain_class: type[_BatchNorm] = nn.BatchNorm2d

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (N, C, ...), got {input.dim()} dimensions")

    def forward(self, input: Tensor) -> Tensor:
        output = self._normalise(input)
        return output if self.activation is None else self.activation(output)

    def _normalise(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if len(input) % self.views:
            raise ValueError(f"a training batch of {len(input)} does not hold {self.views} views of equal size")
        across = self.sees_other_ranks
        if fits_cuda(self, input):
            return normalise_on_cuda(self, input, views=self.views, across_ranks=across, group=self.group)
        if (across or self.views > 1) and fits_cpu(self, input, views=self.views, across_ranks=across):
            normalised = normalise_on_cpu(self, input, views=self.views, across_ranks=across, group=self.group, relu=False)
            self.update_running(normalised)
            return normalised.output
        if across:
            normalised = cross_replica_normalise(input, self.weight, self.bias, eps=self.eps, views=self.views, group=self.group)
            self.update_running(normalised)
            return normalised.output
        if self.views == 1:
            return super().forward(input)
        # torch's own kernels, view by view: the compiler knows them, and on a CPU they are faster than any composition of smaller operations.
        plain = super().forward
        return torch.cat([plain(view) for view in input.chunk(self.views)])

    @property
    def sees_other_ranks(self) -> bool:
        """True if training statistics are computed over more than one process."""
        return self.across_ranks and dist.is_initialized() and dist.get_world_size() > 1

    @torch.no_grad()
    def update_running(self, normalised: Normalised) -> None:
        """Updates the running statistics with those of each view in turn."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        # As in torch: normalisation uses the biased variance, the running statistics the unbiased one.
        unbiased = normalised.variance * (normalised.count / (normalised.count - 1))
        for mean, variance in zip(normalised.mean, unbiased, strict=True):
            self.num_batches_tracked.add_(1)
            # momentum None is a cumulative average, as in torch: the weight of the new batch is 1 / batches so far.
            weight = self.momentum if self.momentum is not None else self.num_batches_tracked.to(mean).reciprocal()
            self.running_mean.lerp_(mean.to(self.running_mean), weight)
            self.running_var.lerp_(variance.to(self.running_var), weight)


def convert_to_view_batchnorm(module: nn.Module, *, views: int) -> nn.Module:
    """Replaces each batch norm in the module, in place if it has children, and returns the module.

    nn.SyncBatchNorm and timm's norms with an activation are converted too. Raises ValueError for any other class that does more than
    normalise.
    """
    if isinstance(module, _BatchNorm) and not isinstance(module, ViewBatchNorm):
        return _converted(module, views=views)
    for name, child in module.named_children():
        setattr(module, name, convert_to_view_batchnorm(child, views=views))
    return module


def use_all_ranks(module: nn.Module, *, group: str = "") -> None:
    """Makes every `ViewBatchNorm` in the module compute its training statistics over all ranks (no effect with one process), or over those
    of the process group with that name.
    """
    for layer in module.modules():
        if isinstance(layer, ViewBatchNorm):
            layer.across_ranks, layer.group = True, group


def convert_to_batchnorm(module: nn.Module) -> nn.Module:
    """Converts each `ViewBatchNorm` back to its original class, with the same tensors under the same names."""
    if isinstance(module, ViewBatchNorm):
        plain = module.plain_class(module.num_features, **_options(module))
        for name, child in () if module.activation is None else module.activation.named_children():
            setattr(plain, name, child)
        return _with_tensors_of(module, plain)
    for name, child in module.named_children():
        setattr(module, name, convert_to_batchnorm(child))
    return module


def _converted(module: _BatchNorm, *, views: int) -> ViewBatchNorm:
    replacement = ViewBatchNorm(module.num_features, views=views, **_options(module))
    replacement.plain_class = type(module)
    if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        after = OrderedDict(module.named_children())
        if list(after) != ["drop", "act"]:
            raise ValueError(f"{type(module).__name__}: a batch norm of this class cannot be given statistics per view")
        replacement.activation = nn.Sequential(after)
    return _with_tensors_of(module, replacement)


def _options(module: _BatchNorm) -> dict[str, Any]:
    return {name: getattr(module, name) for name in ("eps", "momentum", "affine", "track_running_stats")}


def _with_tensors_of(source: _BatchNorm, module: Norm) -> Norm:
    # The same objects: new Parameters would unfreeze the target, and DDP would fail at the second step.
    module.weight, module.bias = source.weight, source.bias
    module.running_mean, module.running_var = source.running_mean, source.running_var
    module.num_batches_tracked = source.num_batches_tracked
    return module.train(source.training)
