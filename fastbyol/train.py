"""Pre-train BYOL.

    torchrun --nproc-per-node 8 fastbyol/train.py --preset r50_300ep --data.train imagenet/train.beton --out runs/r50
    python fastbyol/train.py --preset cpu_demo --data.train demo/fashion/train.beton --out runs/demo
    torchrun --nproc-per-node 2 fastbyol/train.py --preset r50_100ep --data.train train.beton --out runs/r50 --rank_batch 128

`python -m fastbyol train …` and `torchrun … -m fastbyol train …` are the same, wherever the package is installed.

The same command again continues the run where it stopped: after Ctrl-C, SIGTERM or SIGUSR1 it finishes the step and saves it. Method: Grill
et al., NeurIPS 2020, algorithm 1. Exit codes: 0 complete, 75 stopped and saved, 2 bad input, 3 diverged, 4 no room for the last checkpoint,
5 a rank was lost, 1 an error in fastbyol; torchrun itself returns 1 for all but 0. scripts/README.md has launch files for one node, several
nodes, SLURM and Kubernetes.
"""

from __future__ import annotations

from fastbyol.host.signals import StopRequest, end_with_torchrun, leave_at_once_on_signals

if __name__ == "__main__":
    leave_at_once_on_signals()  # the imports below take seconds

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial

import torch
from torch import nn

from fastbyol.byol import BYOLOutput, build_byol
from fastbyol.config.errors import LOST_EXIT, STOPPED_EXIT, Lost, UserError, is_out_of_memory, one_line_errors
from fastbyol.config.schema import TrainConfig, accumulation_of
from fastbyol.data import ViewBatch, build_run_loader, views_on_device
from fastbyol.evaluation.online_knn import build_online_knn, check_online_knn
from fastbyol.models import check_image_size, use_all_ranks
from fastbyol.monitors import Monitor, build_monitor
from fastbyol.optim import build_optimizer, check_update
from fastbyol.ranks.data_parallel import gradient_reduction, replicate
from fastbyol.ranks.process_group import Process, join_process_group, leave_process_group, lost_ranks_named
from fastbyol.run.bn_statistics import bn_group, bn_ranks, check_bn_images
from fastbyol.run.command_line import parse_train_config
from fastbyol.run.hang_watch import HangWatch
from fastbyol.run.initial_weights import load_initial_weights
from fastbyol.run.log import close_logging, configure_logging
from fastbyol.run.plan import RunPlan
from fastbyol.run.precision import autocast, build_scaler, check_compile, compiles_augmentation, input_dtype, prepare_model
from fastbyol.run.rank_agreement import opened_alike, require_same_start
from fastbyol.run.rng_state import seed_rank
from fastbyol.run.session import Session, check_run
from fastbyol.run.state import TrainState


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    end_with_torchrun()
    config = parse_train_config(arguments, usage=__doc__ or "")
    with StopRequest(grace_s=config.grace_s) as stop:
        process = join_process_group(timeout_s=config.timeout_s)
        configure_logging(quiet=not process.is_main)
        complete = None
        try:
            with lost_ranks_named(process):
                complete = train(config, process, stop)
        except Lost:
            if stop.requested and not process.is_main:
                sys.exit(LOST_EXIT)  # torchrun ends this rank because of another one, which has said why
            raise
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(out_of_memory_text(config, process)) from error
        finally:
            close_logging()
            # The session's hang watch has ended, and leaving the group may hang if a peer or a device does.
            with HangWatch(config.timeout_s):
                leave_process_group(failed=complete is None)
    if not complete:
        sys.exit(STOPPED_EXIT)


def train(config: TrainConfig, process: Process, stop: StopRequest) -> bool:
    """Trains the run that the config describes, from where it stopped. Returns False if it was asked to stop before its last step."""
    # Everything that can be refused is checked before images are read or a folder is made.
    require_same_start(config, process)
    mirror = None
    if process.is_main:
        mirror = check_run(config)
        check_online_knn(config)
    state = build(config, process, mirrored=mirror.steps if mirror else ())
    plan = RunPlan.of(config, num_samples=state.loader.num_samples)
    with ExitStack() as leaving:
        session = leaving.enter_context(Session(config, process, state, plan, stop, mirror))
        monitor = build_monitor(config, process)
        knn = build_online_knn(config, process, num_samples=plan.num_samples, first_step=session.first_step, total_steps=plan.total_steps)
        if knn is not None:
            leaving.callback(knn.close)
        batches = leaving.enter_context(closing(state.loader.endless()))
        for step in range(session.first_step, plan.total_steps):
            lr, tau, done = plan.lr(step), plan.tau(step), step + 1
            # Norms are computed only in steps that are logged.
            monitor.start_step(logged=plan.logs(done))
            output = train_step(config, process, state, batches, monitor, lr=lr, tau=tau)
            session.end_step(done)
            if plan.logs(done):
                # Reads the means from the device; steps that are not logged read nothing there.
                record = monitor.record(step=step, epoch=plan.epoch(done), lr=lr, tau=tau, last=output)
                if knn is not None and knn.due(done):
                    with monitor.paused(), session.paused():
                        record["knn_top1"] = knn.top1(state.byol.online.encoder)
                # Written first, so that the record with the alarm is in the log of the run that it ends.
                session.log(record)
                monitor.stop_when_collapsed(session.saved_steps)
            if plan.saves(done) or session.stopping:
                session.save()
            if session.stopping:
                break
    return session.end()


def train_step(
    config: TrainConfig, process: Process, state: TrainState, batches: Iterator[ViewBatch], monitor: Monitor, *, lr: float, tau: float
) -> BYOLOutput:
    """Takes one optimizer step: the gradient over one global batch, the online network's update, the target's. Returns the last forward's output."""
    for group in state.optimizer.param_groups:
        # Set in every step, so that a resumed run needs no scheduler state.
        group["lr"] = lr * group.get("lr_factor", 1.0)
    for micro in range(state.accumulate):
        with monitor.waiting():
            batch = next(batches)
        views, label = views_on_device(
            batch,
            config.views,
            process.device,
            dtype=input_dtype(config.precision, device=process.device),
            compiled=compiles_augmentation(process.device),
        )
        with gradient_reduction(state.model, now=micro == state.accumulate - 1):
            with autocast(config.precision, device=process.device):
                output: BYOLOutput = state.model(views, None, label)
            # One backward for both: the probe reads a detached feature, so its gradient stays in its own weights.
            loss = output.loss + output.probe_loss
            state.scaler.scale(loss / state.accumulate).backward()
        state.finite.add(loss)
        monitor.add(output)
    # Before the norms are taken and before LARS, whose trust ratio would otherwise contain the scale.
    state.scaler.unscale_(state.optimizer)
    monitor.gradients_ready(state.byol.online)
    # The target moves inside the step: under fp16 the scaler leaves out a step whose gradient is not finite, and then neither network may move.
    state.scaler.step(state.optimizer, target_update=state.byol.target_update(tau, backend=config.optim.update))
    state.scaler.update()
    # None instead of zeros: the next backward writes the gradients without reading them first.
    state.optimizer.zero_grad(set_to_none=True)
    monitor.step()
    return output


def build(config: TrainConfig, process: Process, *, mirrored: Sequence[int] = ()) -> TrainState:
    """Builds the loader, the networks and the optimizer, with the same weights on every rank.

    mirrored: steps of the run's checkpoints in its mirror; a run that goes on from one needs no `init_from`.
    """
    check_image_size(config.views.size_px, encoder=config.model.encoder, stem=config.model.stem)
    check_bn_images(config, process)
    check_update(config.optim.update, process.device)
    loader = opened_alike(partial(build_run_loader, config, process), process)
    accumulate = accumulation_of(config, world_size=process.world_size)
    check_compile(config.precision, device=process.device, accumulate=accumulate)
    # Set right before the networks are built, so that they get the same weights on every rank.
    torch.manual_seed(config.seed)
    byol = build_byol(config.model, num_classes=max(1, len(loader.class_names)), objective=config.objective)
    if process.is_main and not mirrored:
        load_initial_weights(byol, config)  # DDP sends them to the other ranks
    if bn_ranks(config, process) > 1:
        # Before compilation, which would otherwise trace statistics of this rank alone.
        use_all_ranks(byol, group=bn_group(config, process))
    prepare_model(byol, config.precision, device=process.device)
    model: nn.Module = byol
    if process.world_size > 1:
        model = replicate(byol, config.precision, accumulate=accumulate)
    seed_rank(config.seed, rank=process.rank)
    return TrainState(
        byol=byol,
        model=model,
        optimizer=build_optimizer(config.optim, byol),
        scaler=build_scaler(config.precision, device=process.device),
        loader=loader,
        accumulate=accumulate,
    )


def out_of_memory_text(config: TrainConfig, process: Process) -> str:
    """Returns what did not fit into the device's memory, and what takes less."""
    images = config.rank_batch or config.global_batch // process.world_size
    halves = images > 2 and images % 2 == 0
    smaller = f"--rank_batch {images // 2} (micro-batches, whose gradients are added up)" if halves else "a smaller --global_batch"
    return (
        f"out of memory on {process.device}: {images:,} images in one forward pass, two views each, of {config.model.encoder} at {config.views.size_px} px; "
        f"give {smaller}, more ranks, a smaller encoder or --views.size_px; python -m fastbyol tune finds what fits"
    )


if __name__ == "__main__":
    main()
