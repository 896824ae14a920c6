"""Estimates the seconds, memory and disk of a task from a few real steps or forward passes on this machine, for --dry_run."""

from __future__ import annotations

import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fastbyol.data.backends.source import Indices
from fastbyol.data.loader import ImageLoader
from fastbyol.evaluation.tasks.job import Job
from fastbyol.evaluation.tasks.scoring import outputs
from fastbyol.host.quantities import bytes_text, duration_text
from fastbyol.ranks.process_group import gather_everywhere
from fastbyol.run.precision import autocast

READ_AHEAD = 5
"""First steps that are not timed: they compile, and their images were loaded ahead."""
TIMED = 4
LossOf = Callable[[nn.Module, Any], Tensor]
"""(network, batch) -> mean loss, as `train_network` takes it."""
TEST_SHARE = 1 / 3
"""Operations of a forward pass without gradients, as a share of a training step's."""
GPU_PROBE, CPU_PROBE = 128, 16
MEASURED_STEPS = 3
MEASURED_IMAGES = 64
"""Images of a measured step: enough for an estimate, and quick on a CPU."""


@dataclass(frozen=True)
class StepCost:
    """Cost of a training step on this rank's device.

    batch: images of a measured step. image_s: seconds an image of this rank, with its loading. image_bytes: memory for the gradients of
    one image. state_bytes: weights, gradients and momentum. saved_bytes: weights and momentum on the disk.
    """

    batch: int
    image_s: float
    image_bytes: float
    state_bytes: int
    saved_bytes: int

    def seconds(self, *, trained: float, tested: float, ranks: int) -> float:
        """Returns the seconds that the ranks need to train on `trained` images and pass `tested` images forward without gradients."""
        return (trained + TEST_SHARE * tested) * self.image_s / ranks

    def lines(self, *, trained: float, tested: float, ranks: int, rank_batch: int) -> list[str]:
        """Returns lines with the estimated time, memory and disk, for a user before the start."""
        seconds = self.seconds(trained=trained, tested=tested, ranks=ranks)
        devices = "this device" if ranks == 1 else f"{ranks} devices like this one"
        rate = f"{ranks / self.image_s:.3g} images/s in training"
        return [
            f"time: about {duration_text(seconds)} on {devices}, {rate}, from {TIMED} steps of {self.batch} measured here",
            f"memory: about {bytes_text(self.image_bytes * rank_batch + self.state_bytes)} a device: {bytes_text(self.state_bytes)} for "
            f"weights, gradients and momentum, and {bytes_text(self.image_bytes)} for each of its {rank_batch:,} images",
            f"disk: {bytes_text(self.saved_bytes)} for the state of one training at a time, deleted at the end",
        ]


def probe_batch(job: Job, rank_batch: int) -> int:
    """Returns how many images of this rank a measured step has: few, because a batch of the task may not fit here."""
    return min(rank_batch, GPU_PROBE if job.process.device.type == "cuda" else CPU_PROBE)


def measure_step(job: Job, *, network: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator, loss_of: LossOf) -> StepCost:
    """Trains the network for a few steps on its own rank, and returns what they cost; all ranks measure at once, the slowest one counts.

    batches: for ever; of each, the length of the first tensor is the number of images.
    """
    network.train()
    moments, batch, image_bytes = [], 0, 0.0
    for step in range(READ_AHEAD + TIMED):
        data = next(batches)
        batch = len(data[0])
        if step == 1:  # the first one compiles
            image_bytes = _bytes_for_gradients(job, network, data, loss_of) / batch
        with autocast(job.precision, device=job.process.device):
            loss = loss_of(network, data)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())  # waits for the device
        moments.append(time.perf_counter())
    step_s = statistics.median(after - before for before, after in pairwise(moments[READ_AHEAD - 1 :]))
    weights = sum(value.numel() * value.element_size() for value in network.parameters())
    slowest = max(gather_everywhere(step_s))
    return StepCost(batch, slowest / batch, image_bytes, state_bytes=3 * weights, saved_bytes=2 * weights)


def _bytes_for_gradients(job: Job, network: nn.Module, data: tuple[Tensor, ...], loss_of: LossOf) -> float:
    """Returns how much memory a forward pass keeps for the backward pass."""
    device = job.process.device
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        with autocast(job.precision, device=device):
            loss = loss_of(network, data)
        kept = torch.cuda.memory_allocated(device) - before
        loss.backward()
        return kept
    own = {value.untyped_storage().data_ptr() for value in network.parameters()}
    held: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return saved

    with saved_tensors_hooks(note, lambda saved: saved), autocast(job.precision, device=device):
        loss_of(network, data).backward()
    return sum(held.values())


def measured_seconds(step: Callable[[], object], *, device: torch.device, repeats: int = MEASURED_STEPS) -> float:
    """Returns the median time of a step after one that warms up."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def seconds_per_image(job: Job, network: nn.Module, loader: ImageLoader, rows: Indices) -> float:
    """Returns the seconds that one rank takes to load an image and pass it through the network without gradients."""
    chosen = rows[: min(len(rows), job.batch, MEASURED_IMAGES)]
    return measured_seconds(lambda: list(outputs(job, network, loader, chosen)), device=job.process.device) / len(chosen)


def estimate_lines(job: Job, images: float, seconds: float, *, work_bytes: float, what: str) -> list[str]:
    """Returns lines for the estimated time, disk and memory of a job.

    images: number of `what`, of all ranks. seconds: of one rank for one of them. work_bytes: size of the unfinished work on disk.
    """
    ranks = job.process.world_size
    total = images * seconds / ranks
    peak = peak_memory_bytes(job.process.device)
    folder = next(parent for parent in (job.folder, *job.folder.parents) if parent.exists())
    return [
        f"time: about {duration_text(total)} for {images:,.0f} {what} on {ranks} {job.process.device.type} rank{'s' if ranks > 1 else ''}, "
        f"at {1 / seconds:,.1f} a second each, measured here on {MEASURED_STEPS} small batches",
        f"disk: {bytes_text(work_bytes)} for unfinished work in {job.work}, where {bytes_text(shutil.disk_usage(folder).free)} are free",
        f"memory: {bytes_text(peak)} so far, in batches of {job.batch}",
    ]


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the largest memory in use so far: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
