"""Traces a training step of a GPU without one: which operations it launches, how many bytes they move, and where the host would wait.

Tensors are fake (on CUDA, or on the meta device for the backward, which autograd refuses to run on fake CUDA tensors), and so are the other
ranks, so nothing is computed and no time is measured. The product's own functions are called in the order of `train_step`, and so are those
of a rival's step.

Bytes are those of all operands: an operand is read once and a result written once, whatever the kernel does inside. A tensor that an
operation only overwrites is not read.
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

from benchmarks.rival_steps import RivalStep
from fastbyol.augment.parameters import NUM_COLUMNS
from fastbyol.byol import build_byol
from fastbyol.config.schema import TrainConfig, accumulation_of
from fastbyol.data.batch import ViewBatch, views_on_device
from fastbyol.models import use_all_ranks, view_batchnorm
from fastbyol.monitors import Monitor
from fastbyol.optim.build import build_optimizer
from fastbyol.run.finite_check import FiniteCheck
from fastbyol.run.precision import build_scaler, input_dtype

CUDA, META = torch.device("cuda", 0), torch.device("meta")
NUM_CLASSES = 1000
WAITING = frozenset(
    {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "_assert_async", "item"}
)
"""Operations whose result, or its shape, the host has to read."""
_READS_ON_HOST = ("_local_scalar_dense", "item", "is_nonzero")
_OVERWRITES = ("copy_", "fill_", "zero_", "normal_")
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


class Watch(TorchDispatchMode):
    """Adds operations to the stage. What the host reads is answered, for there is nothing to read: a condition is true, a number 0, and a mask
    chooses everything.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, name = func._schema.name.split("::")
        result = self._answer(name, args) if _is_answered(name, args) else func(*args, **kwargs)
        passed = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        only_written = [leaf for leaf in tree_leaves(kwargs.get("out")) if isinstance(leaf, Tensor)]
        read = [t for t in passed[name in _OVERWRITES :] if all(t is not other for other in only_written)]
        self._note_wait(name, args, kwargs, passed, written)
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

    @staticmethod
    def _answer(name: str, args: Any) -> Any:
        if name == "index":
            return torch.empty_like(args[0])
        return name == "is_nonzero" or args[0].dtype == torch.bool or 0

    def _note_wait(self, name: str, args: Any, kwargs: Any, read: list[Tensor], written: list[Tensor]) -> None:
        # An optimizer may count its steps in a tensor on the host.
        if (name in WAITING or _by_mask(name, args)) and any(t.device.type != "cpu" for t in read):
            self.stage.waits.append(name)
        if name in ("_to_copy", "copy_") and {t.device.type for t in read + written} == {"cpu", "cuda"}:
            non_blocking = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
            if not non_blocking:
                self.stage.waits.append(f"{name} of {tuple(read[-1].shape)} blocks")


def _by_mask(name: str, args: Any) -> bool:
    return name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])


def _is_answered(name: str, args: Any) -> bool:
    return (name in _READS_ON_HOST or _by_mask(name, args)) and args[0].device.type != "cpu"


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
    """Returns the stages of an eager step with `batch` images a rank in each forward pass, the augmentation eager too (compiled, see
    `generated_code`). Micro-batches are added up.
    """
    with fake_ranks(world_size), _fake_kernels():
        return _with_backward(lambda device: _trace(config, device, world_size=world_size, batch=batch))


def trace_rival(kind: type[RivalStep], config: TrainConfig, *, world_size: int, batch: int) -> dict[str, Stage]:
    """Returns the stages of a rival's eager step with torch's nn.SyncBatchNorm, with views already on the device; for CUDA's ranks, 2 or more."""
    with fake_ranks(world_size), _fake_kernels():
        return _with_backward(lambda device: _trace_rival(kind, config, device, batch=batch))


def _with_backward(trace: Callable[[torch.device], dict[str, Stage]]) -> dict[str, Stage]:
    """Returns the stages on fake CUDA, with the backward of the meta device."""
    with ExitStack() as patched:
        patched.enter_context(mock.patch("fastbyol.monitors.stopwatch.Stopwatch._mark", return_value=0.0))
        # Otherwise torch turns autocast and the gradient scaler off where it sees no GPU.
        patched.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False))
        patched.enter_context(mock.patch("torch.cuda.is_bf16_supported", return_value=True))
        stages = trace(CUDA)
        patched.enter_context(mock.patch.object(view_batchnorm, "fits_cuda", return_value=True))
        # torch's SyncBatchNorm takes CUDA's tensors and those of one device of another maker.
        patched.enter_context(mock.patch("torch._C._get_privateuse1_backend_name", return_value=META.type))
        stages["backward"] = trace(META)["backward"]
    return stages


def _watched(stages: dict[str, Stage]) -> Callable[[str, Callable[[], Any]], Any]:
    """Returns a function that adds the work of a call to the stage of that name, and returns the call's result."""

    def stage(name: str, work: Callable[[], Any]) -> Any:
        with Watch(stages.setdefault(name, Stage())):
            return work()

    return stage


def _trace(config: TrainConfig, device: torch.device, *, world_size: int, batch: int) -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    stage, on_gpu = _watched(stages), device.type == "cuda"
    with torch.device(META):
        byol = build_byol(config.model, num_classes=NUM_CLASSES, objective=config.objective)
    with FakeTensorMode(allow_non_fake_inputs=True) if on_gpu else nullcontext():
        _move(byol, device)
        if world_size > 1 and config.precision.cross_replica_bn:
            use_all_ranks(byol)
        optimizer, scaler = build_optimizer(config.optim, byol), build_scaler(config.precision, device=CUDA)
        finite, monitor = FiniteCheck(), Monitor(global_batch=config.global_batch, world_size=world_size, device=device)
        arriving = _arriving(config, batch, torch.device("cpu") if on_gpu else device)
        dtype, accumulate = input_dtype(config.precision, device=device), accumulation_of(config, world_size=world_size)

        def forward(views: Tensor, label: Tensor) -> tuple[Any, Tensor]:
            with torch.autocast("cuda" if on_gpu else "cpu", dtype=dtype, enabled=dtype != torch.float32):
                output = byol(views, None, label)
            return output, output.loss + output.probe_loss

        for _ in range(accumulate):
            views, label = stage("augmentation", lambda: views_on_device(arriving, config.views, device, dtype=dtype))
            output, loss = stage("forward", functools.partial(forward, views, label))
            if on_gpu:
                stage("scale", functools.partial(lambda loss: scaler.scale(loss / accumulate), loss))
                stage("monitor", functools.partial(lambda output, loss: (finite.add(loss), monitor.add(output)), output, loss))
            else:
                stage("backward", (loss / accumulate).backward)
        if not on_gpu:
            return stages
        for parameter in byol.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        for group in optimizer.param_groups:
            group["lr"] = 0.1

        def update() -> None:
            scaler.unscale_(optimizer)
            scaler.step(optimizer, target_update=byol.target_update(0.99, backend=config.optim.update))
            scaler.update()

        with Watch(Stage()):
            update()  # makes the momentum buffers
        stage("update", update)
    return stages


def _trace_rival(kind: type[RivalStep], config: TrainConfig, device: torch.device, *, batch: int) -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    stage, on_gpu = _watched(stages), device.type == "cuda"
    with torch.device(META):
        step = kind(config, num_classes=NUM_CLASSES, lr=0.1, tau=0.99, device=META)
    step.synchronise()
    with FakeTensorMode(allow_non_fake_inputs=True) if on_gpu else nullcontext(), device:
        for network in (step.online, step.target, step.probe):
            _move(network, device)
        shape = batch, 3, config.views.size_px, config.views.size_px
        # The meta device has no autocast; there the views are in 16 bits from the start, and so is what follows.
        dtype = torch.float32 if on_gpu else torch.bfloat16
        view1, view2 = (torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
        arriving = ViewBatch(view1, view2, torch.zeros(batch, dtype=torch.int64), torch.arange(batch), torch.empty(0))
        with torch.autocast("cuda" if on_gpu else "cpu", dtype=torch.bfloat16):
            loss = stage("forward", lambda: step.loss(arriving))
        if not on_gpu:
            stage("backward", loss.backward)
            return stages
        for parameter in step.online.parameters():
            parameter.grad = torch.empty_like(parameter)
        with Watch(Stage()):
            step.update()  # makes the momentum buffers
        stage("update", step.update)
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
