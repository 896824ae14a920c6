"""Runs the measurements in order: the step first, then the loader that has to feed it, then both together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from fastbyol.config.errors import UserError, require_at_least, require_between
from fastbyol.config.schema import accumulation_of
from fastbyol.data.build import build_run_loader
from fastbyol.ranks.process_group import Process
from fastbyol.train import build
from fastbyol.tuning.bench import Bench, Findings, Request, cores_per_rank
from fastbyol.tuning.loader_tuning import Reading, readings, tune_reading, tune_workers
from fastbyol.tuning.step_tuning import num_ways_to_compile, switches, tune_step, update_ways
from fastbyol.tuning.whole_tuning import tune_whole

SAMPLE_IMAGES = 32


def tune(request: Request, *, announce: Callable[[str], None]) -> Findings:
    """Returns the fastest settings, with the measurements they were chosen by; announces what happens next, and first how long it takes.

    Raises UserError, before any measurement, for anything that a run with this config would refuse, and for paths with different images.
    """
    bench = _set_up(request, announce)
    ways = readings(request.paths, request.config.data, device=bench.process.device.type, kept=request.kept)
    check_images(bench, ways)
    announce(_plan(bench, ways))
    # The step first: how many loader threads are enough depends on its speed.
    stepper, step_rate = tune_step(bench)
    tune_reading(bench, ways)
    loader_rates = tune_workers(bench, step_rate=step_rate)
    tune_whole(bench, stepper, loader_rates=loader_rates)
    return bench.found


def _set_up(request: Request, announce: Callable[[str], None]) -> Bench:
    require_between("--seconds", request.seconds, 0.01, 3600.0)
    if (os.environ.get("WORLD_SIZE") or "1") != "1":
        raise UserError(
            "tune: measures with one process; start it with plain python, and give the number of processes of the planned run with --ranks"
        )
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    ranks = (torch.cuda.device_count() or 1) if request.ranks is None else request.ranks
    require_at_least("--ranks", ranks, 1)
    config = request.config
    if config.global_batch % ranks:
        raise UserError(f"global_batch = {config.global_batch}: not divisible by {ranks} ranks; give --ranks or another batch")
    accumulation_of(config, world_size=ranks)
    return Bench(
        request=request,
        process=Process(rank=0, world_size=1, device=device),
        share=config.global_batch // ranks,
        cores=cores_per_rank(ranks, device=device),
        found=Findings(config, per="GPU" if device.type == "cuda" else "CPU process", ranks=ranks),
        announce=announce,
    )


def check_images(bench: Bench, ways: Sequence[Reading]) -> None:
    """Opens everything that a run would open, so that a run's errors come before the measurements; keeps a batch of real images."""
    # Batches of one, so that a data set of any size opens: whether it fills a global batch is said below.
    data = bench.found.config.data
    num_images: dict[str, int] = {}
    for way in ways:
        with build_run_loader(bench.trial_config(1, data=way.applied(data)), bench.process, option="--data") as loader:
            num_images[way.path] = loader.num_samples
    if len(set(num_images.values())) > 1:
        counts = ", ".join(f"{path}: {num:,}" for path, num in num_images.items())
        raise UserError(f"--data: not the same images ({counts}); convert all of them from one folder")
    num = num_images[ways[0].path]
    if bench.found.config.global_batch > num:
        raise UserError(f"global_batch = {bench.found.config.global_batch}: the data has {num:,} images; take a smaller batch or more data")
    bench.found.choose(data=ways[0].applied(data))
    with build(bench.trial_config(min(bench.micro_batch, SAMPLE_IMAGES)), bench.process).loader as loader:
        bench.sample.append(next(iter(loader)))


def _plan(bench: Bench, ways: Sequence[Reading]) -> str:
    seconds = bench.request.seconds
    compiled = num_ways_to_compile(bench)
    most = 4 + (len(ways) > 1) + bench.on_gpu + compiled + len(switches(bench)) + (len(update_ways(bench)) > 1)
    compiling = ", compilation" if compiled else ""
    return (
        f"at most {most} comparisons of {seconds:g} s, {most * seconds:.0f} s in all, plus building and warming up between them{compiling}; "
        f"{bench.process.device}, {bench.cores} cores, {torch.get_num_threads()} torch threads. Ctrl-C ends it, and nothing is written then"
    )
