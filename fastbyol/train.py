"""Pre-train BYOL.

    torchrun --nproc-per-node 8 fastbyol/train.py --preset r50_300ep --data.train imagenet/train.beton --out runs/r50
    python fastbyol/train.py --preset cpu_demo --data.train demo/fashion/train.beton --out runs/demo
    torchrun --nproc-per-node 2 fastbyol/train.py --preset r50_100ep --data.train train.beton --out runs/r50 --rank_batch 128

The same command again continues the run where it stopped. Method: Grill et al., NeurIPS 2020, algorithm 1.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastbyol
from fastbyol.byol import BYOLOutput, build_byol
from fastbyol.checkpoint import checkpoint_steps
from fastbyol.command_line import parse_train_config
from fastbyol.config.errors import one_line_errors, require
from fastbyol.config.schema import TrainConfig, accumulation_of
from fastbyol.data import build_loader
from fastbyol.data.batch import ViewBatch
from fastbyol.data.device import views_on_device
from fastbyol.data.loader import TwoViewLoader
from fastbyol.evaluation.online_knn import build_online_knn
from fastbyol.models.resnet import check_image_size
from fastbyol.models.sync_batchnorm import convert_to_cross_replica
from fastbyol.monitors import Monitor, build_monitor
from fastbyol.optim.build import build_optimizer
from fastbyol.precision import autocast, build_scaler, prepare_model
from fastbyol.process_group import Process, join_process_group, leave_process_group
from fastbyol.run_log import RunLog, close_logging, configure_logging, open_run_folder
from fastbyol.schedules import lr_at, tau_at, total_steps_at
from fastbyol.train_state import TrainState

log = logging.getLogger("fastbyol")


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    config = parse_train_config(arguments, usage=__doc__ or "")
    process = join_process_group()
    configure_logging(quiet=not process.is_main)
    try:
        train(config, process)
    finally:
        close_logging()
        leave_process_group()


def train(config: TrainConfig, process: Process) -> None:
    """The run that the config describes, from where it stopped to its last checkpoint."""
    state = build(config, process)
    num_samples, optim = state.loader.num_samples, config.optim
    total_steps = total_steps_at(config.epochs, num_samples=num_samples, global_batch=config.global_batch)
    warmup_steps = total_steps_at(optim.warmup_epochs, num_samples=num_samples, global_batch=config.global_batch)
    require(total_steps > 0, "epochs", config.epochs, f"enough for one step of {config.global_batch} of the {num_samples} images")
    folder = open_run_folder(config) if process.is_main else Path(config.out)
    first_step = state.restore(folder)
    announce(config, process, state, first_step=first_step, total_steps=total_steps)

    run_log = None
    if process.is_main:
        run_log = RunLog(folder, total_steps=total_steps, first_step=first_step, wandb_project=config.monitors.wandb_project)
    monitor = build_monitor(config, process)
    online_knn = build_online_knn(config, process, num_samples=num_samples, first_step=first_step, total_steps=total_steps)
    batches = endless(state.loader)
    for step in range(first_step, total_steps):
        lr = lr_at(step, total_steps=total_steps, warmup_steps=warmup_steps, base_lr=optim.base_lr, global_batch=config.global_batch)
        tau = tau_at(step, total_steps=total_steps, tau_base=optim.tau_base)
        done = step + 1
        logged = done % config.log_every == 0 or done == total_steps
        monitor.start_step(logged=logged)
        output = train_step(config, process, state, batches, monitor, lr=lr, tau=tau)
        if logged:
            record = monitor.record(step=step, epoch=done * config.global_batch / num_samples, lr=lr, tau=tau, last=output)
            if online_knn is not None and online_knn.due(done):
                with monitor.paused():
                    record["knn_top1"] = online_knn.top1(state.byol.online.encoder)
            if run_log is not None:
                run_log.write(record)
            monitor.stop_when_collapsed(lambda: checkpoint_steps(folder))
        if process.is_main and (done % config.checkpoint_every == 0 or done == total_steps):
            state.save(folder, step=done, config=config)
    batches.close()
    state.loader.close()
    if online_knn is not None:
        online_knn.close()
    if run_log is not None:
        run_log.close()


def train_step(
    config: TrainConfig, process: Process, state: TrainState, batches: Iterator[ViewBatch], monitor: Monitor, *, lr: float, tau: float
) -> BYOLOutput:
    """One optimizer step: the gradient over one global batch, the online network's update, then the target's. Returns the last forward."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    accumulate = accumulation_of(config, world_size=process.world_size)
    for micro in range(accumulate):
        with monitor.waiting():
            batch = next(batches)
        view1, view2, label = views_on_device(batch, config.views, process.device)
        with gradient_reduction(state.model, now=micro == accumulate - 1):
            with autocast(config.precision, device=process.device):
                output: BYOLOutput = state.model(view1, view2, label)
            state.scaler.scale((output.loss + output.probe_loss) / accumulate).backward()
        monitor.add(output)
    state.scaler.unscale_(state.optimizer)
    monitor.gradients_ready(state.byol.online)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.byol.update_target(tau)
    monitor.step()
    return output


def build(config: TrainConfig, process: Process) -> TrainState:
    """Loader, networks and optimizer; the same weights on every rank."""
    check_image_size(config.views.size_px, encoder=config.model.encoder, stem=config.model.stem)
    loader = build_loader(
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
    torch.manual_seed(config.seed)
    byol = build_byol(config.model, num_classes=len(loader.class_names), objective=config.objective)
    model: nn.Module = byol
    if process.world_size > 1:
        if config.precision.cross_replica_bn:
            convert_to_cross_replica(byol)
        prepare_model(byol, config.precision, device=process.device)
        # BN buffers are equal on all ranks by construction (or each rank's own), so no broadcast before each forward. torch 2.14 has a new name
        # for the option, which 2.11 does not know, and warns.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = DistributedDataParallel(byol, broadcast_buffers=False, gradient_as_bucket_view=True)
    else:
        prepare_model(byol, config.precision, device=process.device)
    optimizer = build_optimizer(config.optim, byol)
    return TrainState(
        byol=byol, model=model, optimizer=optimizer, scaler=build_scaler(config.precision, device=process.device), loader=loader
    )


def endless(loader: TwoViewLoader) -> Generator[ViewBatch, None, None]:
    """Batches from where the loader stands, epoch after epoch."""
    while True:
        yield from loader
        loader.set_epoch(loader.state_dict()["epoch"])


def gradient_reduction(model: nn.Module, *, now: bool) -> AbstractContextManager[object]:
    """Lets DDP average gradients in the last backward of a step only."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not now else nullcontext()


def announce(config: TrainConfig, process: Process, state: TrainState, *, first_step: int, total_steps: int) -> None:
    """What runs, in the first lines of the log: an old installed copy, a wrong data set or batch is seen here."""
    log.info("fastbyol %s from %s", fastbyol.__version__, Path(fastbyol.__file__).parent)
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
        log.info("continues at step %d", first_step)


if __name__ == "__main__":
    main()
