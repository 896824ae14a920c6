"""Trains a task's network: one loop for heads, fine-tuning, segmentation, detection and depth, which goes on where it was stopped."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbyol.config.errors import STOPPED_EXIT, Diverged, RunError, first_line
from fastbyol.evaluation.tasks.job import Job
from fastbyol.host.durable_files import durable_file
from fastbyol.host.progress import Progress
from fastbyol.ranks.data_parallel import replicate
from fastbyol.ranks.process_group import broadcast_from_main, copy_from_main
from fastbyol.ranks.stop_vote import StopVote
from fastbyol.run.precision import autocast, build_scaler

log = logging.getLogger("fastbyol")
SAVE_EVERY_S = 60.0
CHECK_EVERY = 50
"""Steps between two looks at the loss: each waits for the device."""


class TaskStopped(RunError):
    """A signal ended the task; what it has is kept, and the same command goes on."""

    exit_code = STOPPED_EXIT


@dataclass(frozen=True)
class TrainingFigures:
    """steps and seconds of this process, without those before a stop; images_per_s over all ranks; loss: of the last step."""

    steps: int
    seconds: float
    images_per_s: float
    loss: float


def train_network(
    job: Job,
    key: str,
    *,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_at: Callable[[int], float],
    batches: Callable[[int], Iterator[Any]],
    loss_of: Callable[[nn.Module, Any], Tensor],
    total_steps: int,
    step_images: int,
) -> TrainingFigures:
    """Trains the network in place, from its last saved state if there is one, and returns the figures of this process.

    Call it inside `job.once(key, ...)`, which deletes the state once the scores are kept. Running batch-norm statistics are rank 0's
    afterwards, on every rank.

    Args:
        job: precision, ranks, folder.
        key: name of this training in the job.
        network: on the job's device, in training mode where it should be; batch norm is each rank's own.
        optimizer: over the network's parameters; a group may have 'lr_factor', by which the rate is multiplied.
        lr_at: step -> learning rate, pure.
        batches: first step -> batches from that step on, for ever; a pure function of the step, so that a stop changes nothing.
        loss_of: (network or its DDP wrapper, batch) -> mean loss over this rank's images, called under autocast.
        total_steps: length of the training.
        step_images: images of all ranks in one step.

    Raises:
        Diverged: the loss is not finite.
        TaskStopped: a signal arrived; the state is saved.
    """
    process = job.process
    path, scaler = job.part(key, ".pt"), build_scaler(job.precision, device=process.device)
    first = _restore(job, path, network=network, optimizer=optimizer, scaler=scaler)
    model = replicate(network, job.precision, accumulate=1) if process.world_size > 1 else network
    vote = StopVote(rank=process.rank, world_size=process.world_size)
    start = saved = time.monotonic()
    loss = torch.zeros(())
    with ExitStack() as leaving:
        progress = leaving.enter_context(Progress(key, total_steps, unit="steps", done=first)) if process.is_main else None
        source = batches(first)
        for step in range(first, total_steps):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step) * group.get("lr_factor", 1.0)
            batch = next(source)
            with autocast(job.precision, device=process.device):
                loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            if progress is not None:
                progress.reach(done)
            last = done == total_steps
            if done % CHECK_EVERY == 0 or last:
                _require_finite(job, key, loss, done)
            if vote.cast(stop=job.stop.requested, bad_step=None, settle=last).stop and not last:
                _save(job, path, done, network=network, optimizer=optimizer, scaler=scaler)
                raise TaskStopped(f"{job.task}: stopped after step {done:,} of {total_steps:,} of {key}, saved; the same command goes on")
            # Rank 0's state is enough: only running batch-norm statistics differ between ranks, and those of rank 0 are the ones tested.
            # The last state stays until `Job.once` has the scores, in case the test is what is stopped.
            if last or time.monotonic() - saved > SAVE_EVERY_S:
                _save(job, path, done, network=network, optimizer=optimizer, scaler=scaler)
                saved = time.monotonic()
        if isinstance(source, Generator):
            source.close()
    copy_from_main(network.buffers())
    seconds, steps = time.monotonic() - start, total_steps - first
    return TrainingFigures(steps, seconds, step_images * steps / seconds if steps else 0.0, float(loss.detach()))


def raise_if_stopped(job: Job) -> None:
    """Ends the task between two of its parts if a signal has reached any rank. Raises TaskStopped; every rank calls it."""
    vote = StopVote(rank=job.process.rank, world_size=job.process.world_size)
    if vote.cast(stop=job.stop.requested, bad_step=None, settle=True).stop:
        raise TaskStopped(f"{job.task}: stopped; what is finished is kept, and the same command goes on")


def _require_finite(job: Job, key: str, loss: Tensor, done: int) -> None:
    finite = torch.isfinite(loss.detach()).float().cpu()
    if job.process.world_size > 1:
        torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
    if not bool(finite):
        raise Diverged(f"{job.task}: {key}: the loss is not finite at or before step {done:,}")


def _save(job: Job, path: Path, step: int, **parts: Any) -> None:
    if not job.process.is_main:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    held = io.BytesIO()
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, held)
    with durable_file(path) as file:
        rest = held.getbuffer()
        while rest:
            rest = rest[file.write(rest) :]


def _restore(job: Job, path: Path, **parts: Any) -> int:
    """Loads the state that rank 0 saved into the parts, on every rank, and returns its step; 0 without one."""
    state = None
    if job.process.is_main and path.is_file():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            # Take all parts from the file before any is loaded: a half-loaded state would be neither the saved nor a new start.
            state = {name: state[name] for name in ("step", *parts)}
        except Exception as error:
            log.warning("%s: cannot be read (%s); this part starts again", path, first_line(error))
            path.unlink()
            state = None
    # Sent, because the ranks of other machines may not see rank 0's folder.
    state = broadcast_from_main(state)
    if state is None:
        return 0
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]
