"""Estimates of a job for --dry_run: its time from a step measured on this machine, its disk and its memory."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from fastbyol.data.backends.source import Indices
from fastbyol.data.loader import ImageLoader
from fastbyol.evaluation.tasks.job import Job
from fastbyol.evaluation.tasks.scoring import outputs
from fastbyol.host.quantities import bytes_text, duration_text

MEASURED_STEPS = 3
MEASURED_IMAGES = 64
"""Images of a measured step: enough for an estimate, and quick on a CPU."""


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

    images: number of `what`, of all ranks. seconds: of one rank for each. work_bytes: of the unfinished work on disk.
    """
    ranks = job.process.world_size
    total = images * seconds / ranks
    peak = torch.cuda.max_memory_allocated(job.process.device) if job.process.device.type == "cuda" else _resident_bytes()
    folder = next(parent for parent in (job.folder, *job.folder.parents) if parent.exists())
    return [
        f"time: about {duration_text(total)} for {images:,.0f} {what} on {ranks} {job.process.device.type} rank{'s' if ranks > 1 else ''}, "
        f"at {1 / seconds:,.1f} a second each, measured here on {MEASURED_STEPS} small batches",
        f"disk: {bytes_text(work_bytes)} of unfinished work in {job.work}, where {bytes_text(shutil.disk_usage(folder).free)} are free",
        f"memory: {bytes_text(peak)} so far, in batches of {job.batch}",
    ]


def _resident_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
