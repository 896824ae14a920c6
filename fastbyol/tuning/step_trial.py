"""Times the training step itself: on the same batch again and again, or on the batches of a loader."""

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
from fastbyol.ranks.process_group import Process
from fastbyol.run.state import TrainState
from fastbyol.train import build, train_step
from fastbyol.tuning.memory import memory_as_failure

LR, TAU = 0.01, 0.99
"""Small enough that the loss stays finite when a batch is seen a hundred times; the cost of a step does not depend on them."""


class Pace(NamedTuple):
    """Images per second, and the share of the time in which the step waited for data."""

    images_per_s: float
    wait_share: float


class _Networks:
    """The networks of a run, built when they are first needed, so that a lack of memory fails the trial that needs them."""

    def __init__(self, config: TrainConfig, process: Process) -> None:
        self._config, self._process = config, process

    @cached_property
    def state(self) -> TrainState:
        state = build(self._config, self._process)
        state.loader.close()
        return state


class Stepper:
    """Takes training steps with the networks and the optimizer of a config, and writes nothing.

    Args:
        config: the config of one process: its global batch is this process's share.
        process: a process without other ranks: the figures contain no messages between ranks.
        networks: the networks of another stepper, whose config may differ in the batch and optim.update only; None builds new ones.
    """

    def __init__(self, config: TrainConfig, process: Process, *, networks: _Networks | None = None) -> None:
        self.config, self._process = config, process
        self._networks = networks or _Networks(config, process)
        self._monitor = build_monitor(config, process)

    def with_batch(self, global_batch: int, *, rank_batch: int = 0) -> Self:
        """Returns a stepper for another batch with the same networks: a second copy might not fit in memory."""
        return type(self)(replace(self.config, global_batch=global_batch, rank_batch=rank_batch), self._process, networks=self._networks)

    def with_update(self, update: str) -> Self:
        """Returns a stepper with the same networks that moves the target by another optim.update."""
        config = replace(self.config, optim=replace(self.config.optim, update=update))
        return type(self)(config, self._process, networks=self._networks)

    def alone(self, sample: ViewBatch) -> Callable[[float], float]:
        """Returns a trial's `run`: steps on the sample's images, repeated to fill a batch."""
        batch = repeated(sample, self.config.rank_batch or self.config.global_batch)

        def run(seconds: float) -> float:
            with memory_as_failure():
                return self._steps(itertools.repeat(batch), seconds).images_per_s

        return run

    def fed_by(self, loader: TwoViewLoader, paces: list[Pace]) -> Callable[[float], float]:
        """Returns a trial's `run`: steps on the loader's batches. Each pace is also added to `paces`."""

        def run(seconds: float) -> float:
            with closing(loader.endless()) as batches, memory_as_failure():
                self._steps(batches, 0.0)  # so that the first batch is made and the queue filled before the clock starts
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
    """Yields the same batches, and adds up how long the caller waited for them."""

    def __init__(self, batches: Iterator[ViewBatch]) -> None:
        self._batches, self.wait_s = batches, 0.0

    def __next__(self) -> ViewBatch:
        start = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.wait_s += time.perf_counter() - start


def repeated(sample: ViewBatch, num: int) -> ViewBatch:
    """Returns a batch of `num` images that repeats the sample's, in the sample's memory layout and pinned if the sample is."""
    rows = torch.arange(num) % len(sample.index)

    def taken(tensor: torch.Tensor) -> torch.Tensor:
        chosen = tensor.movedim(1, -1)[rows.to(tensor.device)].movedim(-1, 1) if tensor.ndim == 4 else tensor[rows.to(tensor.device)]
        return chosen.pin_memory() if tensor.is_pinned() else chosen

    return ViewBatch(*(taken(tensor) for tensor in sample))
