"""Estimates of the dense tasks for --dry_run: hours, disk and memory from a training step on real images, which may be large."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbyol.evaluation.tasks.dense.batches import Source, training_batches
from fastbyol.evaluation.tasks.dense.trials import Schedule
from fastbyol.evaluation.tasks.estimate import peak_memory_bytes
from fastbyol.evaluation.tasks.job import Job
from fastbyol.host.quantities import duration_text
from fastbyol.run.precision import autocast


@dataclass(frozen=True)
class MeasuredStep:
    """Seconds of one training step of `images` images on this rank, as measured; memory: peak of the process, in GiB."""

    seconds: float
    images: int
    memory_gib: float


def plan_training(
    job: Job,
    network: nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[nn.Module, Any], Tensor],
    source: Source,
    collate: Callable[[list[Any]], Any],
    size_px: int,
    trainings: int,
    settings: Schedule,
    num_test: int,
) -> list[str]:
    """Returns what a dry run prints, from a training step on real images here; the arguments are those of the training.

    size_px: side of the images. num_test: number of test images.
    """
    images = measured_images(job, settings.batch_images, size_px=size_px)
    global_batch = images * job.process.world_size
    batches = training_batches(job, source, rows=np.arange(len(source)), global_batch=global_batch, seed=job.seed, collate=collate)
    measured = measure_training(job, network, optimizer=optimizer, loss_of=loss_of, batches=batches(0), images=images)
    return plan_lines(
        job,
        measured,
        trainings=trainings,
        steps=settings.steps,
        batch_images=settings.batch_images,
        num_train=len(source),
        num_test=num_test,
        state_mib=state_mib(network, moments=1),
    )


def measure_training(
    job: Job,
    network: nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[nn.Module, Any], Tensor],
    batches: Iterator[Any],
    images: int,
) -> MeasuredStep:
    """Takes a training step of `images` images on this rank once to warm up, then twice, or once if it takes longer than ten seconds."""
    device = job.process.device

    def step() -> None:
        with autocast(job.precision, device=device):
            loss = loss_of(network, next(batches))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    first = time.perf_counter()
    step()
    _settle(device)
    start = time.perf_counter()
    repeats = 1 if start - first > 10 else 2
    for _ in range(repeats):
        step()
    _settle(device)
    return MeasuredStep((time.perf_counter() - start) / repeats, images, peak_memory_bytes(device) / 2**30)


def measured_images(job: Job, batch_images: int, *, size_px: int) -> int:
    """Returns how many images a measured step of this rank has: its share, but one if they are large and it runs on a CPU, where each takes a minute."""
    share = max(1, batch_images // job.process.world_size)
    return 1 if job.process.device.type == "cpu" and size_px > 128 else share


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plan_lines(
    job: Job, measured: MeasuredStep, *, trainings: int, steps: int, batch_images: int, num_train: int, num_test: int, state_mib: float
) -> list[str]:
    """Returns what a dry run prints: images, steps, hours from the measured step, disk and memory."""
    per_step = measured.seconds * batch_images / (measured.images * job.process.world_size)
    total = duration_text(trainings * steps * per_step)
    return [
        f"{job.task}: {num_train:,} train images, {num_test:,} test images; {len(job.subjects)} encoders",
        f"{trainings} trainings of {steps:,} steps of {batch_images} images ({steps * batch_images / num_train:.1f} epochs)",
        f"about {total} of training: a step of {measured.images} images takes {measured.seconds:.3f} s here, measured ({job.process.device.type}, "
        f"{job.process.world_size} rank{'s' if job.process.world_size > 1 else ''}); the tests come on top",
        f"disk: {state_mib:,.0f} MiB for the state of a training in {job.work}, deleted with the result; memory: {measured.memory_gib:.1f} GiB so far, "
        f"for {measured.images} images on this rank",
    ]


def state_mib(network: nn.Module, *, moments: int) -> float:
    """Returns the size of a saved training state with so many optimizer buffers per parameter."""
    numbers = sum(p.numel() for p in network.parameters())
    return (1 + moments) * numbers * 4 / 2**20
