"""The product's own training step, timed: on one batch again and again, or on what a loader brings."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple, Self

import torch

from fastbyol.config.schema import TrainConfig
from fastbyol.data.batch import ViewBatch
from fastbyol.data.loader import TwoViewLoader
from fastbyol.monitors import build_monitor
from fastbyol.process_group import Process
from fastbyol.train import build, endless, train_step
from fastbyol.train_state import TrainState
from fastbyol.tuning.memory import memory_as_failure

LR, TAU = 0.01, 0.99
"""Small enough that a batch seen a hundred times keeps the loss finite; the cost of a step does not depend on them."""


class Pace(NamedTuple):
    """Images per second, and the share of that time in which the step waited for data."""

    images_per_s: float
    wait_share: float


class _Networks:
    """What a run builds, built when it is first needed: where memory is short, that is a failure of the trial that needs it."""

    def __init__(self, config: TrainConfig, process: Process) -> None:
        self._config, self._process = config, process

    @cached_property
    def state(self) -> TrainState:
        state = build(self._config, self._process)
        state.loader.close()
        return state


class Stepper:
    """Steps with the networks and the optimizer of a config. Writes nothing.

    Args:
        config: of one process: its global batch is this process's share.
        process: without other ranks: their messages are not in the figures.
        networks: of another stepper, whose config differs in the batch only; None: its own.
    """

    def __init__(self, config: TrainConfig, process: Process, *, networks: _Networks | None = None) -> None:
        self.config, self._process = config, process
        self._networks = networks or _Networks(config, process)
        self._monitor = build_monitor(config, process)

    def with_batch(self, global_batch: int, *, rank_batch: int = 0) -> Self:
        """Steps of the same networks, beside which no second copy must fit in memory, on another batch."""
        return type(self)(replace(self.config, global_batch=global_batch, rank_batch=rank_batch), self._process, networks=self._networks)

    def with_update(self, update: str) -> Self:
        """Returns steps of the same networks, in which the target is moved as optim.update says."""
        config = replace(self.config, optim=replace(self.config.optim, update=update))
        return type(self)(config, self._process, networks=self._networks)

    def alone(self, sample: ViewBatch) -> Callable[[float], float]:
        """A trial's `run`: steps on the sample's images, repeated up to a whole batch."""
        batch = repeated(sample, self.config.rank_batch or self.config.global_batch)

        def run(seconds: float) -> float:
            with memory_as_failure():
                return self._steps(itertools.repeat(batch), seconds).images_per_s

        return run

    def fed_by(self, loader: TwoViewLoader, paces: list[Pace]) -> Callable[[float], float]:
        """A trial's `run`: steps on what the loader brings. Each pace is also added to `paces`."""

        def run(seconds: float) -> float:
            with closing(endless(loader)) as batches, memory_as_failure():
                self._steps(batches, 0.0)  # the first batch has to be made, and the queue is filled
                paces.append(self._steps(batches, seconds))
            return paces[-1].images_per_s

        return run

    def _steps(self, batches: Iterator[ViewBatch], seconds: float) -> Pace:
        state, timed = self._networks.state, _Timed(batches)
        images = 0
        self._synchronize()
        start = time.perf_counter()
        while not images or time.perf_counter() - start < seconds:
            train_step(self.config, self._process, state, timed, self._monitor, lr=LR, tau=TAU)
            images += self.config.global_batch
        self._synchronize()
        elapsed_s = time.perf_counter() - start
        return Pace(images / elapsed_s, timed.wait_s / elapsed_s)

    def _synchronize(self) -> None:
        if self._process.device.type == "cuda":
            torch.cuda.synchronize(self._process.device)


class _Timed(Iterator[ViewBatch]):
    """The same batches; knows how long they were waited for."""

    def __init__(self, batches: Iterator[ViewBatch]) -> None:
        self._batches, self.wait_s = batches, 0.0

    def __next__(self) -> ViewBatch:
        start = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.wait_s += time.perf_counter() - start


def repeated(sample: ViewBatch, num: int) -> ViewBatch:
    """A batch of `num` images, the sample's over and over, in the memory layout and kind of memory of the sample."""
    rows = torch.arange(num) % len(sample.index)

    def taken(tensor: torch.Tensor) -> torch.Tensor:
        chosen = tensor.movedim(1, -1)[rows.to(tensor.device)].movedim(-1, 1) if tensor.ndim == 4 else tensor[rows.to(tensor.device)]
        return chosen.pin_memory() if tensor.is_pinned() else chosen

    return ViewBatch(*(taken(tensor) for tensor in sample))
