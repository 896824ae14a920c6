"""Takes the product's own training steps (`fastbyol.tuning.stepper`) on noise or given batches; counts the bytes they move."""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbyol.byol import BYOLOutput, build_byol
from fastbyol.config.plain import to_plain
from fastbyol.config.schema import ModelConfig, TrainConfig, accumulation_of
from fastbyol.config.views import ViewPair
from fastbyol.data.batch import ViewBatch
from fastbyol.data.loader import TwoViewLoader
from fastbyol.monitors import Monitor
from fastbyol.optim.build import build_optimizer
from fastbyol.ranks.process_group import Process
from fastbyol.run.precision import build_scaler, is_bf16_fast, prepare_model
from fastbyol.run.provenance import package_versions
from fastbyol.run.rng_state import rng_state
from fastbyol.run.state import TrainState, bn_images
from fastbyol.tuning.stepper import LR, TAU, Stepper, Timed

CPU = torch.device("cpu")
FORMAT, DTYPE = ("bf16", torch.bfloat16) if is_bf16_fast(CPU) else ("float32", torch.float32)
"""The format that bf16 autocast, the default, computes in on this CPU: bf16 where the CPU has instructions for it."""


@dataclass(frozen=True)
class StepSize:
    """The settings that cases and parts with training steps share."""

    model: ModelConfig
    size_px: int
    batch: int
    rounds: int

    def config(self, **fields: Any) -> TrainConfig:
        """Returns the config of such a step, with other fields as given."""
        shape: dict[str, Any] = {"global_batch": self.batch, "model": self.model, "views": ViewPair(size_px=self.size_px)}
        return TrainConfig(**(shape | fields))


class TrainingStep(Stepper):
    """The product's training step for a config whose data are not read, with its working and waiting times (of the host; a GPU may lag behind)."""

    def __init__(self, config: TrainConfig, *, num_classes: int, device: torch.device = CPU) -> None:
        torch.manual_seed(config.seed)  # all variants of a case start from the same weights
        byol = build_byol(config.model, num_classes=num_classes)
        prepare_model(byol, config.precision, device=device)
        loader = cast(TwoViewLoader, None)  # the steps take their batches from an iterator
        scaler = build_scaler(config.precision, device=device)
        state = TrainState(byol=byol, model=byol, optimizer=build_optimizer(config.optim, byol), scaler=scaler, loader=loader)
        super().__init__(config, Process(rank=0, world_size=1, device=device), networks=lambda: state)
        self._last: BYOLOutput
        self._num_classes = num_classes
        self.forget_times()

    @functools.cached_property
    def noise(self) -> ViewBatch:
        return noise_batch(self.config, num_classes=self._num_classes, device=self.process.device)

    def run_on_noise(self, steps: int = 1) -> None:
        """Takes optimizer steps on the same batch of noise; nothing waits for data."""
        self.run(itertools.repeat(self.noise, steps))

    def state(self) -> dict[str, object]:
        """Returns everything that `TrainState.snapshot` collects for a checkpoint, except the loader's position."""
        networks = self.networks()
        return {
            "config": to_plain(self.config),
            "byol": networks.byol.state_dict(),
            "optimizer": networks.optimizer.state_dict(),
            "scaler": networks.scaler.state_dict(),
            "ranks": {"rng": [rng_state()], "bn_images": bn_images(self.config, self.process)},
            "versions": package_versions(),
        }

    def run(self, batches: Iterable[ViewBatch]) -> None:
        """Takes one optimizer step per batch; a config that accumulates uses the batch for each of its forward passes."""
        forwards = accumulation_of(self.config, world_size=1)
        # Host time: no synchronisation here, which a run does not have either.
        start, timed = time.perf_counter(), Timed(iter(batches))
        for batch in timed:
            self._last = self.step(itertools.repeat(batch, forwards))
        self._wait_s += timed.wait_s
        self._total_s += time.perf_counter() - start

    def forget_times(self) -> None:
        """Resets the times, so that shares do not include steps that compiled or touched memory for the first time."""
        self._wait_s = self._total_s = 0.0
        self.monitor = Monitor(global_batch=self.config.global_batch, world_size=1, device=self.process.device)

    @property
    def last(self) -> BYOLOutput:
        """The output of the last forward pass."""
        return self._last

    @property
    def data_wait_share(self) -> float:
        """Share of the time in `run` that was spent waiting for a batch."""
        return self._wait_s / self._total_s

    def time_shares(self) -> dict[str, float]:
        """Returns shares of time since the last call, which sum to 1; waits for the device. On a GPU only data_wait_share is host time."""
        record = self.monitor.record(step=0, epoch=0.0, lr=LR, tau=TAU, last=self._last)
        computing_ms = record["forward_backward_ms"] + record["update_ms"]
        wait = self.data_wait_share
        parts = {name: (1 - wait) * record[f"{name}_ms"] / computing_ms for name in ("forward_backward", "update")}
        return {"data_wait_share": wait, **{f"{name}_share": share for name, share in parts.items()}}


def forget_times(steps: Iterable[TrainingStep]) -> None:
    for step in steps:
        step.forget_times()


def noise_batch(config: TrainConfig, *, num_classes: int, device: torch.device = CPU) -> ViewBatch:
    """Returns the batch of one forward pass: normal noise in both views, already on the device and in the step's memory layout."""
    generator = torch.Generator(device).manual_seed(0)
    layout = torch.channels_last if config.precision.channels_last else torch.contiguous_format
    num, size_px = config.rank_batch or config.global_batch, config.views.size_px
    shape = (num, 3, size_px, size_px)
    view1, view2 = (torch.randn(shape, generator=generator, device=device).contiguous(memory_format=layout) for _ in range(2))
    index = torch.arange(num, device=device)
    return ViewBatch(view1, view2, index % num_classes, index, torch.empty(num, 2, 0, device=device))


def bytes_moved(work: Callable[[], object]) -> int:
    """Returns the bytes of all operands and results of torch's operations in `work`, forward and backward: what moves if no cache helps."""
    return sum(bytes_by_operation(work).values())


def bytes_by_operation(work: Callable[[], object]) -> Counter[str]:
    """Returns the same by the operation's name, as 'aten::add'."""
    with _TrafficCounter() as counter:
        work()
    return counter.num_bytes


class _TrafficCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = any(argument.alias_info is not None and not argument.alias_info.is_write for argument in func._schema.arguments)
        if not is_view and not func._schema.name.startswith(("aten::empty", "aten::detach", "aten::_reshape_alias")):
            tensors = (leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor))
            self.num_bytes[func._schema.name] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result
