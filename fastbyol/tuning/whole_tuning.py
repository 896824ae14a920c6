"""Tunes steps on real batches: threads where loader and step share cores, the length of the queue, and the speed of both together."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from statistics import median

import torch

from fastbyol.config.errors import UserError
from fastbyol.config.schema import DataConfig
from fastbyol.data.build import build_run_loader
from fastbyol.monitors.compute import ComputeMeter
from fastbyol.tuning import candidates
from fastbyol.tuning.bench import Bench
from fastbyol.tuning.comparison import Comparison, Trial
from fastbyol.tuning.report import WAIT_SHARE, Speeds, verdict
from fastbyol.tuning.stepper import Pace, Stepper

REFERENCE = "step alone"
"""Measured once more in the same rounds as the whole, because the two are compared."""


def tune_whole(bench: Bench, stepper: Stepper, *, loader_rates: Mapping[int, float]) -> None:
    """Chooses the threads (the fewest that feed the step, or the fastest loader's), then the length of the queue, and concludes.

    `loader_rates`: images per second of the loader alone, by threads.
    """
    data = bench.found.config.data
    fastest = max(loader_rates, key=lambda count: loader_rates[count])
    comparison, waits = _fed(bench, stepper, "threads", {str(n): replace(data, workers=n) for n in sorted({data.workers, fastest})})
    chosen = bench.found.add(comparison, "data.workers")
    workers = int(chosen)
    data = replace(data, workers=workers)
    reason = _reason_not_to_queue(bench, waits=waits[chosen], loader_rate=loader_rates[workers], step_rate=comparison.rate(REFERENCE))
    if reason:
        bench.found.notes["data.prefetch"] = reason
    else:
        queues = {str(n): replace(data, prefetch=n) for n in candidates.own_first(data.prefetch, candidates.PREFETCH)}
        comparison, waits = _fed(bench, stepper, "prefetch", queues)
        chosen = bench.found.add(comparison, "data.prefetch")
        data = queues[chosen]
    bench.found.choose(data=data)
    step_rate = comparison.rate(REFERENCE)
    speeds = Speeds(
        loader=loader_rates[workers],
        step=step_rate,
        whole=comparison.rate(chosen),
        wait_share=waits[chosen],
        workers=workers,
        workers_needed=candidates.workers_to_feed(loader_rates, step_rate=step_rate),
        cores=bench.cores,
        torch_threads=torch.get_num_threads(),
        on_gpu=bench.on_gpu,
    )
    bench.found.lines = _conclusion(bench, speeds)


def _reason_not_to_queue(bench: Bench, *, waits: float, loader_rate: float, step_rate: float) -> str | None:
    """Returns why other lengths of the queue are not tried, or None if they may help: if the step waits although the loader is faster."""
    if bench.keeps("data.prefetch"):
        return "kept as given"
    if waits <= WAIT_SHARE:
        return f"not tuned: the step waits {waits:.0%} of the time"
    return None if loader_rate >= step_rate else "not tuned: the loader is slower than the step, and no queue changes that"


def _fed(bench: Bench, stepper: Stepper, what: str, variants: Mapping[str, DataConfig]) -> tuple[Comparison, dict[str, float]]:
    """Compares steps on each variant's batches with the step alone; also returns the median share of the time that each waits for them."""
    paces: dict[str, list[Pace]] = {name: [] for name in variants}
    with ExitStack() as leaving:
        trials = [Trial(REFERENCE, stepper.alone(bench.sample[0]))]
        for name, data in variants.items():
            loader = leaving.enter_context(build_run_loader(replace(stepper.config, data=data), bench.process, option="--data"))
            trials.append(Trial(name, stepper.fed_by(loader, paces[name])))
        comparison = replace(bench.compare(f"end to end, {what}", trials), reference=REFERENCE)
    if REFERENCE in comparison.failed or len(comparison.rates) < 2:
        reasons = ", ".join(f"{name}: {reason}" for name, reason in comparison.failed.items())
        raise UserError(f"end to end: {reasons}; give a smaller --rank_batch, which tune then keeps")
    num_rounds = len(comparison.rates[REFERENCE])
    measured = {name: paces[name][-num_rounds:] for name in variants if name in comparison.rates}  # the first ones warmed up
    return comparison, {name: median(pace.wait_share for pace in taken) for name, taken in measured.items()}


def _conclusion(bench: Bench, speeds: Speeds) -> list[str]:
    """Returns the figures and the verdict, one line each."""
    per = bench.found.per
    short = f", more than the {speeds.cores} cores that it has" if speeds.workers_needed > speeds.cores else ""
    lines = [
        f"end to end {speeds.whole:,.0f} images/s per {per}; loader alone {speeds.loader:,.0f}, step alone {speeds.step:,.0f}",
        verdict(speeds),
        f"loader threads per {per} that feed the step with {candidates.FEED_MARGIN - 1:.0%} to spare: {speeds.workers_needed}{short}",
    ]
    compute = ComputeMeter(bench.found.config, device=bench.process.device).rates(images_per_s_per_device=speeds.whole)
    if compute["mfu"] is not None:
        lines.append(f"{compute['tflop_per_s_per_device']:.1f} TFLOP/s per GPU, {compute['mfu']:.1%} of its peak")
    return lines
