"""Traces a training step of a GPU without one: which operations it launches, how many bytes they move, and where the host would wait.

Tensors are fake (on CUDA, or on the meta device for the backward, which autograd refuses to run on fake CUDA tensors), and so are the other
ranks, so nothing is computed and no time is measured. The product's own functions are called in the order of `train_step`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbyol.augment.parameters import NUM_COLUMNS
from fastbyol.byol import build_byol
from fastbyol.config.schema import TrainConfig
from fastbyol.data.batch import ViewBatch, views_on_device
from fastbyol.models import use_all_ranks, view_batchnorm
from fastbyol.monitors import Monitor
from fastbyol.optim.build import build_optimizer
from fastbyol.run.finite_check import FiniteCheck
from fastbyol.run.precision import input_dtype

CUDA, META = torch.device("cuda", 0), torch.device("meta")
NUM_CLASSES = 1000
WAITING = frozenset(
    {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "_assert_async", "item"}
)
"""Operations whose result, or its shape, the host has to read."""
_NO_WORK = ("empty", "detach", "_reshape_alias", "new_empty", "lift_fresh", "wait_tensor")


@dataclass
class Stage:
    """The work of one part of a step: launches of operations, bytes that they read and write if no cache helps, and what makes the host wait."""

    launches: int = 0
    num_bytes: int = 0
    waits: list[str] = field(default_factory=list)
    names: Counter[str] = field(default_factory=Counter)

    def megabytes_an_image(self, batch: int) -> float:
        return self.num_bytes / batch / 1e6


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        space, name = func._schema.name.split("::")
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._note_wait(name, args, kwargs, read, written)
        is_view = any(argument.alias_info is not None and not argument.alias_info.is_write for argument in func._schema.arguments)
        if not is_view and space != "prim" and not name.startswith(_NO_WORK):
            self.stage.launches += 1
            self.stage.names[name] += 1
            fills = name.endswith("_like") or name.startswith("new_")
            self.stage.num_bytes += sum(t.numel() * t.element_size() for t in (written if fills else read + written))
            if "native_batch_norm" in name:  # its statistics are a pass of their own over what the rest reads again
                largest = max(t.numel() * t.element_size() for t in read)
                self.stage.num_bytes += (2 if "backward" in name else 1) * largest
        return result

    def _note_wait(self, name: str, args: Any, kwargs: Any, read: list[Tensor], written: list[Tensor]) -> None:
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        # An optimizer may count its steps in a tensor on the host.
        if (name in WAITING or by_mask) and any(t.device.type != "cpu" for t in read):
            self.stage.waits.append(name)
        if name in ("_to_copy", "copy_") and {t.device.type for t in read + written} == {"cpu", "cuda"}:
            non_blocking = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
            if not non_blocking:
                self.stage.waits.append(f"{name} of {tuple(read[-1].shape)} blocks")


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """Makes this process rank 0 of a group whose messages go nowhere; one rank has no group."""
    if world_size > 1:
        dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def trace_step(config: TrainConfig, *, world_size: int, batch: int) -> dict[str, Stage]:
    """Returns the stages of an eager step with `batch` images a rank, the augmentation eager too (compiled, see `generated_code`)."""
    with fake_ranks(world_size), _fake_kernels(), ExitStack() as patched:
        patched.enter_context(mock.patch("fastbyol.monitors.stopwatch.Stopwatch._mark", return_value=0.0))
        # Otherwise torch turns autocast off where it sees no GPU.
        patched.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False))
        patched.enter_context(mock.patch("torch.cuda.is_bf16_supported", return_value=True))
        stages = _trace(config, CUDA, world_size=world_size, batch=batch)
        patched.enter_context(mock.patch.object(view_batchnorm, "fits_cuda", return_value=True))
        stages["backward"] = _trace(config, META, world_size=world_size, batch=batch)["backward"]
    return stages


def _trace(config: TrainConfig, device: torch.device, *, world_size: int, batch: int) -> dict[str, Stage]:
    stages: dict[str, Stage] = {}

    def stage(name: str, work: Callable[[], Any]) -> Any:
        with _Watch() as watch:
            result = work()
        stages[name] = watch.stage
        return result

    on_gpu = device.type == "cuda"
    with torch.device(META):
        byol = build_byol(config.model, num_classes=NUM_CLASSES, objective=config.objective)
    with FakeTensorMode(allow_non_fake_inputs=True) if on_gpu else nullcontext():
        _move(byol, device)
        if world_size > 1 and config.precision.cross_replica_bn:
            use_all_ranks(byol)
        optimizer = build_optimizer(config.optim, byol)
        finite, monitor = FiniteCheck(), Monitor(global_batch=batch * world_size, world_size=world_size, device=device)
        arriving = _arriving(config, batch, torch.device("cpu") if on_gpu else device)
        dtype = input_dtype(config.precision, device=device)
        views, label = stage("augmentation", lambda: views_on_device(arriving, config.views, device, dtype=dtype))

        def forward() -> Any:
            with torch.autocast("cuda" if on_gpu else "cpu", dtype=dtype, enabled=dtype != torch.float32):
                return byol(views, None, label)

        output = stage("forward", forward)
        loss = output.loss + output.probe_loss
        if not on_gpu:
            stage("backward", loss.backward)
            return stages
        stage("monitor", lambda: (finite.add(loss), monitor.add(output)))
        for parameter in byol.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        take_step: Any = optimizer.step
        step = functools.partial(take_step, target_update=byol.target_update(0.99))
        step()  # makes the momentum buffers
        stage("update", step)
    return stages


def _arriving(config: TrainConfig, batch: int, device: torch.device) -> ViewBatch:
    """Returns a batch as the loader yields it for a GPU."""
    size = config.views.size_px
    crops = torch.empty(2, batch, size, size, 3, dtype=torch.uint8, device=device).permute(0, 1, 4, 2, 3)
    label, index = torch.zeros(batch, dtype=torch.int64, device=device), torch.arange(batch)
    return ViewBatch(crops[0], crops[1], label, index, torch.empty(batch, 2, NUM_COLUMNS, device=device))


def _move(module: nn.Module, device: torch.device) -> None:
    """Gives the module new, empty parameters and buffers on the device, in channels-last memory."""
    # Module.to swaps the data of parameters, which fake tensors refuse.
    for layer in module.modules():
        both: list[dict[str, Any]] = [layer._parameters, layer._buffers]
        for tensors in both:
            for name, old in tensors.items():
                if old is not None:
                    layout = torch.channels_last if old.dim() == 4 else torch.contiguous_format
                    new = torch.empty(old.shape, dtype=old.dtype, device=device, memory_format=layout)
                    tensors[name] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


@contextmanager
def _fake_kernels() -> Iterator[None]:
    """Tells fake tensors what torch's CUDA-only kernels return."""
    library = torch.library.Library("aten", "IMPL")

    def channels(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)

    shapes: dict[str, Callable[..., Any]] = {
        "batch_norm_stats": lambda x, eps: (channels(x), channels(x)),
        "batch_norm_gather_stats_with_counts": lambda x, *_: (channels(x), channels(x)),
        "batch_norm_elemt": lambda x, *_: torch.empty_like(x),
        "batch_norm_elemt.out": lambda x, *_, out: out,
        "batch_norm_backward_reduce": lambda g, x, *_: (channels(x), channels(x), channels(x), channels(x)),
        "batch_norm_backward_elemt": lambda g, x, *_: torch.empty_like(x),
        "_fused_sgd_": lambda *_, **__: None,
    }
    try:
        for name, shape in shapes.items():
            library.impl(name, shape, "Meta")
        yield
    finally:
        library._destroy()
