"""Takes training steps and times them: on the same batch again and again, or on the batches of a loader; finds what fits into memory."""

from __future__ import annotations

import functools
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch

from fastbyol.byol import BYOLOutput
from fastbyol.config.errors import is_out_of_memory
from fastbyol.config.schema import TrainConfig, accumulation_of
from fastbyol.data.batch import ViewBatch
from fastbyol.data.loader import TwoViewLoader
from fastbyol.monitors import Monitor
from fastbyol.ranks.process_group import Process
from fastbyol.run.precision import use_switches
from fastbyol.run.state import TrainState
from fastbyol.train import build, train_step
from fastbyol.tuning.comparison import TrialFailed

LR, TAU = 0.01, 0.99
"""Small enough that the loss stays finite when a batch is seen a hundred times; the cost of a step does not depend on them."""

MEMORY_SHARE = 0.9
"""Share of the card's memory that the training step may take: a run evaluates too, and DALI decodes there."""


class Pace(NamedTuple):
    """Images per second, and the share of the time in which the step waited for data."""

    images_per_s: float
    wait_share: float


def build_networks(config: TrainConfig, process: Process) -> TrainState:
    """Returns the networks and the optimizer of a run, whose loader is closed."""
    state = build(config, process)
    state.loader.close()
    return state


class Stepper:
    """Takes training steps with the networks and the optimizer of a config, whose global batch is this process's share; writes nothing.

    `networks` returns those of another stepper, whose config may differ in the batch, precision.cudnn_benchmark and optim.update only; None builds new ones.
    """

    def __init__(self, config: TrainConfig, process: Process, *, networks: Callable[[], TrainState] | None = None) -> None:
        self.config, self.process = config, process
        self._accumulate = accumulation_of(config, world_size=process.world_size)
        # Built by the first step, so that a lack of memory fails the trial that needs them.
        self.networks = networks or functools.cache(functools.partial(build_networks, config, process))
        self.monitor = Monitor(global_batch=config.global_batch, world_size=process.world_size, device=process.device)

    def with_batch(self, global_batch: int, *, rank_batch: int = 0) -> Stepper:
        """Returns a stepper for another batch with the same networks: a second copy might not fit in memory."""
        return Stepper(replace(self.config, global_batch=global_batch, rank_batch=rank_batch), self.process, networks=self.networks)

    def with_search(self, *, search: bool) -> Stepper:
        """Returns a stepper with the same networks and precision.cudnn_benchmark as given."""
        precision = replace(self.config.precision, cudnn_benchmark=search)
        return Stepper(replace(self.config, precision=precision), self.process, networks=self.networks)

    def with_update(self, update: str) -> Stepper:
        """Returns a stepper with the same networks that moves the target by another optim.update."""
        config = replace(self.config, optim=replace(self.config.optim, update=update))
        return Stepper(config, self.process, networks=self.networks)

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

    def step(self, batches: Iterator[ViewBatch]) -> BYOLOutput:
        """Takes one optimizer step on the next batches, one for each forward pass."""
        state = self.networks()
        state.accumulate = self._accumulate  # steppers with other batches share these networks
        return train_step(self.config, self.process, state, batches, self.monitor, lr=LR, tau=TAU)

    def _steps(self, batches: Iterator[ViewBatch], seconds: float) -> Pace:
        self.networks()
        timed, images = Timed(batches), 0
        use_switches(self.config.precision)  # steppers with other switches may have run in between
        # A GPU works asynchronously: without waiting, the clock would miss the queued work, or count that of the candidate before.
        synchronize(self.process.device)
        start = time.perf_counter()
        while not images or time.perf_counter() - start < seconds:
            self.step(timed)
            images += self.config.global_batch
        synchronize(self.process.device)
        elapsed_s = time.perf_counter() - start
        return Pace(images / elapsed_s, timed.wait_s / elapsed_s)


def synchronize(device: torch.device) -> None:
    """Waits for all work queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timed(Iterator[ViewBatch]):
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


@contextmanager
def memory_as_failure() -> Iterator[None]:
    """Turns running out of device memory inside into a TrialFailed."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrialFailed("out of memory") from error


def release_memory() -> None:
    """Frees device memory that is no longer in use, so that a failed trial does not make the next one fail."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def fits_memory(run: Callable[[], object], device: torch.device) -> bool:
    """Says whether the work runs and takes no more than `MEMORY_SHARE` of the device's memory, which is freed afterwards."""
    fits = True
    try:
        with memory_as_failure():
            run()
    except TrialFailed:
        fits = False
    if fits and device.type == "cuda":
        fits = torch.cuda.max_memory_allocated(device) <= MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory
    release_memory()  # the exception is gone by now; its frames held the memory
    return fits


def those_that_fit(candidates: Sequence[int], fits: Callable[[int], bool]) -> list[int]:
    """Returns the candidates, which ascend, up to the first that does not fit; larger ones are not tried."""
    return list(itertools.takewhile(fits, candidates))
