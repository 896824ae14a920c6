"""Runs the product's own `train_step` on batches that a benchmark case provides."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import cast

import torch

from fastbyol.byol import BYOLOutput, build_byol
from fastbyol.config.plain import to_plain
from fastbyol.config.schema import TrainConfig, accumulation_of
from fastbyol.data.batch import ViewBatch
from fastbyol.data.loader import TwoViewLoader
from fastbyol.monitors import Monitor
from fastbyol.optim.build import build_optimizer
from fastbyol.ranks.process_group import Process
from fastbyol.run.precision import build_scaler, prepare_model
from fastbyol.run.provenance import package_versions
from fastbyol.run.rng_state import rng_state
from fastbyol.run.state import TrainState, bn_images
from fastbyol.train import train_step

LR, TAU = 0.01, 0.99
"""Small enough that the loss stays finite when one batch is repeated a hundred times; the cost of a step does not depend on them."""


class TrainingStep:
    """Networks and optimizer of a config on one device, with their working and waiting times (of the host; a GPU may lag behind)."""

    def __init__(self, config: TrainConfig, *, num_classes: int, device: torch.device | None = None) -> None:
        self.config = config
        self._process = Process(rank=0, world_size=1, device=device or torch.device("cpu"))
        torch.manual_seed(config.seed)
        byol = build_byol(config.model, num_classes=num_classes)
        prepare_model(byol, config.precision, device=self._process.device)
        self._state = TrainState(
            byol=byol,
            model=byol,
            optimizer=build_optimizer(config.optim, byol),
            scaler=build_scaler(config.precision, device=self._process.device),
            loader=cast(TwoViewLoader, None),  # train_step takes its batches from an iterator
            accumulate=accumulation_of(config, world_size=1),
        )
        self._last: BYOLOutput
        self.forget_times()

    def state(self) -> dict[str, object]:
        """Returns everything that `TrainState.snapshot` collects for a checkpoint, except the loader's position."""
        return {
            "config": to_plain(self.config),
            "byol": self._state.byol.state_dict(),
            "optimizer": self._state.optimizer.state_dict(),
            "scaler": self._state.scaler.state_dict(),
            "ranks": {"rng": [rng_state()], "bn_images": bn_images(self.config, self._process)},
            "versions": package_versions(),
        }

    def run(self, batches: Iterable[ViewBatch]) -> None:
        """Takes one optimizer step per batch; a config that accumulates uses the batch for each of its forward passes."""
        forwards = accumulation_of(self.config, world_size=1)
        start = time.perf_counter()
        for batch in self._timed(batches):
            micro = itertools.repeat(batch, forwards)
            self._last = train_step(self.config, self._process, self._state, micro, self._monitor, lr=LR, tau=TAU)
        self._total_s += time.perf_counter() - start

    def forget_times(self) -> None:
        """Resets the times, so that shares do not include steps that compiled or touched memory for the first time."""
        self._wait_s = self._total_s = 0.0
        self._monitor = Monitor(global_batch=self.config.global_batch, world_size=1, device=self._process.device)

    @property
    def data_wait_share(self) -> float:
        """Share of the time in `run` that was spent waiting for a batch."""
        return self._wait_s / self._total_s

    def time_shares(self) -> dict[str, float]:
        """Returns the shares of time since the last call: data_wait_share, forward_backward_share, update_share; their sum is 1.

        Waits for the device. On a GPU the last two are device time, the first is host time.
        """
        record = self._monitor.record(step=0, epoch=0.0, lr=LR, tau=TAU, last=self._last)
        computing_ms = record["forward_backward_ms"] + record["update_ms"]
        wait = self.data_wait_share
        parts = {name: (1 - wait) * record[f"{name}_ms"] / computing_ms for name in ("forward_backward", "update")}
        return {"data_wait_share": wait, **{f"{name}_share": share for name, share in parts.items()}}

    def _timed(self, batches: Iterable[ViewBatch]) -> Iterator[ViewBatch]:
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self._wait_s += time.perf_counter() - start
            if batch is None:
                return
            yield batch


def synthetic_batch(
    *, num: int, size_px: int, num_classes: int, channels_last: bool, seed: int = 0, device: torch.device | None = None
) -> ViewBatch:
    """Returns a batch of normal noise in both views, already on the device (None: the CPU) and in the step's memory layout."""
    generator = torch.Generator(device or "cpu").manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (num, 3, size_px, size_px)
    view1, view2 = (torch.randn(shape, generator=generator, device=device).contiguous(memory_format=layout) for _ in range(2))
    index = torch.arange(num, device=device)
    return ViewBatch(view1, view2, index % num_classes, index, torch.empty(num, 2, 0, device=device))
