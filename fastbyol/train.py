"""Pre-train BYOL.

    torchrun --nproc-per-node 8 fastbyol/train.py --preset r50_300ep --data.train imagenet/train.beton --out runs/r50
    python fastbyol/train.py --preset cpu_demo --data.train demo/fashion/train.beton --out runs/demo
    torchrun --nproc-per-node 2 fastbyol/train.py --preset r50_100ep --data.train train.beton --out runs/r50 --rank_batch 128

The same command again continues the run where it stopped: after Ctrl-C, SIGTERM or SIGUSR1 it finishes the step and saves it. Method: Grill
et al., NeurIPS 2020, algorithm 1. Exit codes: 0 complete, 75 stopped and saved, 2 bad input, 3 diverged, 4 no room for the last checkpoint,
5 a rank was lost, 1 an error in fastbyol; torchrun itself returns 1 for all but 0. scripts/README.md has launch files for one node, several
nodes, SLURM and Kubernetes.
"""

from __future__ import annotations

from fastbyol.host.signals import StopRequest, end_with_torchrun, leave_at_once_on_signals

if __name__ == "__main__":
    leave_at_once_on_signals()  # the imports below take seconds

import logging
import os
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastbyol
from fastbyol.byol import BYOLOutput, build_byol
from fastbyol.config.errors import LOST_EXIT, STOPPED_EXIT, Diverged, Lost, one_line_errors
from fastbyol.config.plain import to_plain
from fastbyol.config.schema import TrainConfig, accumulation_of
from fastbyol.data import build_loader
from fastbyol.data.batch import ViewBatch, views_on_device
from fastbyol.data.loader import TwoViewLoader
from fastbyol.evaluation.online_knn import build_online_knn, check_online_knn
from fastbyol.models.encoder import check_image_size
from fastbyol.models.view_batchnorm import use_all_ranks
from fastbyol.monitors import Monitor, build_monitor
from fastbyol.optim.build import build_optimizer
from fastbyol.optim.ema import check_update
from fastbyol.ranks.data_parallel import replicate
from fastbyol.ranks.process_group import Process, broadcast_from_main, join_process_group, leave_process_group, lost_ranks_named
from fastbyol.ranks.stop_vote import StopVote, Verdict
from fastbyol.run.checkpoint import check_resume, checkpoint_path, checkpoint_steps, mend_config
from fastbyol.run.checkpoint_writer import CheckpointWriter
from fastbyol.run.command_line import parse_train_config
from fastbyol.run.finite_check import FiniteCheck
from fastbyol.run.folder import CONFIG_FILE, check_run_folder, flatten, locked_run_folder, open_run_folder
from fastbyol.run.hang_watch import HangWatch
from fastbyol.run.initial_weights import load_initial_weights
from fastbyol.run.log import RunLog, close_logging, configure_logging
from fastbyol.run.plan import RunPlan
from fastbyol.run.precision import autocast, build_scaler, is_compiled, prepare_model
from fastbyol.run.profiling import StepProfiler
from fastbyol.run.rank_agreement import opened_alike, require_same_start
from fastbyol.run.state import TrainState, check_bn_images
from fastbyol.run.wandb_log import check_wandb

log = logging.getLogger("fastbyol")


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    end_with_torchrun()
    config = parse_train_config(arguments, usage=__doc__ or "")
    with StopRequest(grace_s=config.grace_s) as stop:
        process = join_process_group(timeout_s=config.timeout_s)
        configure_logging(quiet=not process.is_main)
        try:
            with lost_ranks_named(process):
                complete = train(config, process, stop)
        except Lost:
            if stop.requested and not process.is_main:
                sys.exit(LOST_EXIT)  # torchrun ends this rank because of another one, which has said why
            raise
        finally:
            close_logging()
            leave_process_group()
    if not complete:
        sys.exit(STOPPED_EXIT)


def train(config: TrainConfig, process: Process, stop: StopRequest) -> bool:
    """Trains the run that the config describes, from where it stopped. Returns False if it was asked to stop before its last step."""
    require_same_start(config, process)
    if process.is_main:
        mend_config(Path(config.out))
        check_run_folder(config)
        check_resume(config)
        check_online_knn(config)
        check_wandb(config)
    state = build(config, process)
    plan = RunPlan.of(config, num_samples=state.loader.num_samples)
    with ExitStack() as leaving:
        folder = Path(config.out)
        if process.is_main:
            leaving.enter_context(locked_run_folder(open_run_folder(config)))
        first_step = done = state.restore(folder, config=config, process=process)
        announce(config, process, state, first_step=first_step, total_steps=plan.total_steps)

        hang_watch = leaving.enter_context(HangWatch(config.timeout_s))
        writer, run_log = None, None
        if process.is_main:
            writer = leaving.enter_context(CheckpointWriter(folder, keep=config.keep_checkpoints, stays=plan.stays))
            run_log = leaving.enter_context(RunLog(folder, config, total_steps=plan.total_steps, first_step=first_step))
        monitor = build_monitor(config, process)
        knn = build_online_knn(config, process, num_samples=plan.num_samples, first_step=first_step, total_steps=plan.total_steps)
        if knn is not None:
            leaving.callback(knn.close)
        profiler = leaving.enter_context(build_profiler(config, process, state))
        vote = StopVote(rank=process.rank, world_size=process.world_size)
        batches = leaving.enter_context(closing(endless(leaving.enter_context(state.loader))))
        for step in range(first_step, plan.total_steps):
            lr, tau = plan.lr(step), plan.tau(step)
            monitor.start_step(logged=plan.logs(step + 1))
            output = train_step(config, process, state, batches, monitor, lr=lr, tau=tau)
            done = step + 1
            hang_watch.beat()
            profiler.step()
            logs, saves = plan.logs(done), plan.saves(done)
            # On a GPU the loss is read where the host waits for the device anyhow.
            bad_step = state.finite.first_bad_step() if logs or saves or process.device.type == "cpu" else None
            verdict = vote.cast(stop=stop.requested, bad_step=bad_step, settle=logs or saves)
            if verdict.bad_step is not None:
                raise diverged(verdict, state, plan, saved_steps(folder, writer), first_step=first_step)
            if logs:
                record = monitor.record(step=step, epoch=plan.epoch(done), lr=lr, tau=tau, last=output)
                if knn is not None and knn.due(done):
                    with monitor.paused(), hang_watch.paused():
                        record["knn_top1"] = knn.top1(state.byol.online.encoder)
                if run_log is not None:
                    run_log.write(record)
                monitor.stop_when_collapsed(lambda: saved_steps(folder, writer))
            if run_log is not None:
                run_log.estimate(done)
            if saves or verdict.stop:
                snapshot = state.snapshot(step=done, config=config, process=process)
                if writer is not None:
                    writer.save(snapshot, step=done)
            if verdict.stop:
                break
    broadcast_from_main(None)  # launchers end all ranks when one exits, so none may exit before rank 0 has saved
    if done < plan.total_steps:
        log.info("stopped (%s): saved after step %d of %d; the same command continues", stop.name or "another rank", done, plan.total_steps)
    return done >= plan.total_steps


def train_step(
    config: TrainConfig, process: Process, state: TrainState, batches: Iterator[ViewBatch], monitor: Monitor, *, lr: float, tau: float
) -> BYOLOutput:
    """Takes one optimizer step: the gradient over one global batch, the online network's update, the target's. Returns the last forward's output."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
    accumulate = accumulation_of(config, world_size=process.world_size)
    for micro in range(accumulate):
        with monitor.waiting():
            batch = next(batches)
        view1, view2, label = views_on_device(batch, config.views, process.device, compiled=is_compiled(state.byol))
        with gradient_reduction(state.model, now=micro == accumulate - 1):
            with autocast(config.precision, device=process.device):
                output: BYOLOutput = state.model(view1, view2, label)
            loss = output.loss + output.probe_loss
            state.scaler.scale(loss / accumulate).backward()
        state.finite.add(loss)
        monitor.add(output)
    state.scaler.unscale_(state.optimizer)
    monitor.gradients_ready(state.byol.online)
    # The target moves inside the step: under fp16 the scaler leaves out a step whose gradient is not finite, and then neither network may move.
    state.scaler.step(state.optimizer, target_update=state.byol.target_update(tau, backend=config.optim.update))
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    monitor.step()
    return output


def build(config: TrainConfig, process: Process) -> TrainState:
    """Builds the loader, the networks and the optimizer, with the same weights on every rank."""
    check_image_size(config.views.size_px, encoder=config.model.encoder, stem=config.model.stem)
    check_bn_images(config, process)
    check_update(config.optim.update, process.device)
    open_data = partial(
        build_loader,
        config.data,
        views=config.views,
        seed=config.seed,
        global_batch=config.global_batch,
        accumulate=accumulation_of(config, world_size=process.world_size),
        rank=process.rank,
        world_size=process.world_size,
        device=process.device,
        output="uint8" if process.device.type == "cuda" else "float32",
        traversal=config.data.traversal,
        window_mib=config.data.window_mib,
    )
    loader = opened_alike(open_data, process)
    torch.manual_seed(config.seed)
    byol = build_byol(config.model, num_classes=max(1, len(loader.class_names)), objective=config.objective)
    if config.init_from and process.is_main and not checkpoint_steps(Path(config.out)):
        load_initial_weights(byol, config.init_from)  # DDP sends them to the other ranks
    if config.precision.cross_replica_bn and process.world_size > 1:
        use_all_ranks(byol)
    prepare_model(byol, config.precision, device=process.device)
    model: nn.Module = byol
    if process.world_size > 1:
        model = replicate(byol, config.precision, accumulate=accumulation_of(config, world_size=process.world_size))
    optimizer = build_optimizer(config.optim, byol)
    return TrainState(
        byol=byol,
        model=model,
        optimizer=optimizer,
        scaler=build_scaler(config.precision, device=process.device),
        loader=loader,
        finite=FiniteCheck(forwards_per_step=accumulation_of(config, world_size=process.world_size)),
    )


def build_profiler(config: TrainConfig, process: Process, state: TrainState) -> StepProfiler:
    """Returns rank 0's profiler; it does nothing on other ranks, or if profile_steps is 0."""
    parts = {} if config.precision.compile else dict(state.byol.named_children())
    return StepProfiler(Path(config.out), steps=config.profile_steps if process.is_main else 0, parts=parts, device=process.device)


def endless(loader: TwoViewLoader) -> Generator[ViewBatch, None, None]:
    """Yields batches from the loader's position on, epoch after epoch."""
    while True:
        yield from loader
        loader.set_epoch(loader.state_dict()["epoch"])


def gradient_reduction(model: nn.Module, *, now: bool) -> AbstractContextManager[object]:
    """Returns a context in which DDP averages gradients only if `now`: once per step, in its last backward."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not now else nullcontext()


def saved_steps(folder: Path, writer: CheckpointWriter | None) -> list[int]:
    """Returns the steps of the run's checkpoints, after waiting for one that is being written."""
    if writer is not None:
        writer.wait()
    return checkpoint_steps(folder)


def diverged(verdict: Verdict, state: TrainState, plan: RunPlan, steps: list[int], *, first_step: int) -> Diverged:
    """Returns the error that ends a run whose loss is not finite; nothing of that step is saved. steps: those that have a checkpoint."""
    last = f"the last good checkpoint is {checkpoint_path(Path(plan.config.out), steps[-1])}" if steps else "there is no checkpoint yet"
    scale = f", loss scale {state.scaler.get_scale():g}" if state.scaler.is_enabled() else ""
    step = first_step + (verdict.bad_step or 0)
    return Diverged(
        f"the loss is not finite in step {step + 1} on rank {verdict.bad_rank} (lr {plan.lr(step):.4g}{scale}): the run diverged; lower "
        f"optim.base_lr, lengthen optim.warmup_epochs, or set precision.autocast to off. Nothing of that step was saved: {last}"
    )


def announce(config: TrainConfig, process: Process, state: TrainState, *, first_step: int, total_steps: int) -> None:
    """Logs what is about to run, so that an old installed copy, a wrong data set or a wrong batch is seen in the first lines."""
    log.info("fastbyol %s from %s", fastbyol.__version__, Path(fastbyol.__file__).parent)
    defaults = flatten(to_plain(TrainConfig()))
    chosen = [f"{name}={value}" for name, value in flatten(to_plain(config)).items() if value != defaults[name]]
    log.info("config, all of it in %s: %s", Path(config.out) / CONFIG_FILE, " ".join(chosen))
    loader = state.loader
    log.info("%s: %d images of %d classes, backend %s", config.data.train, loader.num_samples, len(loader.class_names), loader.backend)
    accumulate = accumulation_of(config, world_size=process.world_size)
    log.info(
        "%d x %s: global batch %d = %d ranks x %d micro-batches x %d images; %d steps",
        process.world_size,
        process.device,
        config.global_batch,
        process.world_size,
        accumulate,
        config.global_batch // (process.world_size * accumulate),
        total_steps,
    )
    if config.optim.warmup_epochs >= config.epochs:
        log.warning(
            "optim.warmup_epochs = %g of %g epochs: the learning rate never reaches its peak", config.optim.warmup_epochs, config.epochs
        )
    if first_step >= total_steps:
        log.info("already complete at step %d", first_step)
    elif first_step:
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        log.info("continues after step %d%s", first_step, f" (restart {restart})" if restart != "0" else "")


if __name__ == "__main__":
    main()
