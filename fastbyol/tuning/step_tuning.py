"""Tunes the step alone: number format and memory layout, the batch that fits into memory, compilation, a GPU's switches, and how the target
is moved.

Never run on a GPU by us: the search for the batch, fp16, the switches and the ways to move the target happen only there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fastbyol.config.errors import UserError, first_line
from fastbyol.config.schema import PrecisionConfig
from fastbyol.monitors.compute import largest_activation
from fastbyol.optim.ema import check_update
from fastbyol.run.precision import is_bf16_fast, resolved
from fastbyol.tuning import candidates
from fastbyol.tuning.bench import Bench
from fastbyol.tuning.comparison import MIN_ROUNDS, Trial, TrialFailed
from fastbyol.tuning.stepper import Stepper, fits_memory, release_memory, those_that_fit

SMALLEST_CPU_BATCH = 8
SWITCHES = ("cudnn_benchmark", "pad_stem")
"""Options of `precision` that are worth a trial on a GPU, one after another."""


def tune_step(bench: Bench) -> tuple[Stepper, float]:
    """Returns the networks with the best settings for the step, and images per second of the step alone."""
    bench.found.choose(precision=resolved(bench.found.config.precision, device=bench.process.device))
    own = bench.found.config.precision
    if not bench.keeps("precision.compile"):
        bench.found.choose(precision=candidates.eager(own))
    # Half of what fits: float32 takes twice the memory of bf16, and the networks of several candidates are there at once.
    batch = fitting_batches(bench)[-2:][0] if bench.on_gpu else quick_batch(bench)
    rate = _tune_precision(bench, batch)
    if bench.on_gpu:
        stepper, rate = tune_rank_batch(bench)
    else:
        stepper = bench.stepper(batch)
    stepper, rate = tune_compile(bench, stepper, rate=rate, own=own)
    stepper, rate = tune_switches(bench, stepper, switches(bench), rate=rate)
    return tune_update(bench, stepper, update_ways(bench), rate=rate)


def _tune_precision(bench: Bench, batch: int) -> float:
    """Chooses number format and memory layout, and returns images per second with them."""
    device = bench.process.device
    variants = candidates.precisions(bench.found.config.precision, device=device.type, kept=bench.request.kept, bf16=is_bf16_fast(device))
    steppers = {name: bench.stepper(batch, precision=variant) for name, variant in variants.items()}
    trials = [Trial(name, stepper.alone(bench.sample[0])) for name, stepper in steppers.items()]
    comparison = bench.compare(f"step alone, batch {batch}", trials)
    chosen = bench.found.add(comparison, "precision.autocast", "precision.channels_last")
    bench.found.choose(precision=variants[chosen])
    return comparison.rate(chosen)


def quick_batch(bench: Bench) -> int:
    """Returns the largest batch whose step is short enough for all candidates' rounds: a whole batch may take minutes on a CPU, or all memory."""
    longest_s = bench.request.seconds / (MIN_ROUNDS * 4)  # two number formats in two layouts
    first = min(SMALLEST_CPU_BATCH, bench.micro_batch)
    stepper = bench.stepper(first)
    stepper.alone(bench.sample[0])(0.0)

    def is_quick(batch: int) -> bool:
        return batch == first or batch / stepper.with_batch(batch).alone(bench.sample[0])(0.0) <= longest_s

    return those_that_fit(candidates.doubled_batches(first, most=bench.micro_batch), is_quick)[-1]


def fitting_batches(bench: Bench) -> list[int]:
    """Returns the batches that fit the device's memory in the precision so far, ascending, or the user's own; UserError if none does."""
    release_memory()  # what earlier candidates held
    most = candidates.most_images(largest_activation(bench.found.config.model, size_px=bench.found.config.views.size_px))
    wanted = [bench.micro_batch] if bench.keeps("rank_batch") else candidates.rank_batches(bench.share, most=most)
    precision = bench.found.config.precision
    bench.announce(f"rank_batch that fits {bench.process.device} in {precision.autocast}: {', '.join(map(str, wanted))}")
    stepper = bench.stepper(wanted[0], precision=candidates.eager(precision))

    def fits(batch: int) -> bool:
        run = stepper.with_batch(batch).alone(bench.sample[0])
        return fits_memory(lambda: (run(0.0), run(0.0)), bench.process.device)

    fitting = those_that_fit(wanted, fits)
    if not fitting:
        raise UserError(f"rank_batch = {wanted[0]}: does not fit the GPU's memory; take a smaller encoder or views.size_px")
    return fitting


def tune_rank_batch(bench: Bench) -> tuple[Stepper, float]:
    """Returns the networks with the fastest of the largest batches that fit, and images per second."""
    largest, *smaller = fitting_batches(bench)[-3:][::-1]
    stepper = bench.stepper(largest)
    # All accumulate as many images per update as the largest batch has, or smaller ones would pay for the update more often.
    batches = [largest, *(batch for batch in smaller if largest % batch == 0)]
    trials = [Trial(str(batch), stepper.with_batch(largest, rank_batch=batch).alone(bench.sample[0])) for batch in batches]
    comparison = bench.compare("step alone, rank_batch", trials)
    chosen = bench.found.add(comparison, "rank_batch")
    bench.found.choose(rank_batch=int(chosen))
    return stepper.with_batch(int(chosen)), comparison.rate(chosen)


def tune_compile(
    bench: Bench,
    stepper: Stepper,
    *,
    rate: float,
    own: PrecisionConfig,
    why_not: Callable[..., str | None] = candidates.reason_not_to_compile,
) -> tuple[Stepper, float]:
    """Returns the same networks, compiled if any mode is faster than eager, and images per second.

    `own` is the config's precision before anything was chosen: its compile mode is tried first.
    """
    compiles = resolved(own, device=bench.process.device).compile == "yes"
    if bench.keeps("precision.compile") and not compiles:
        return stepper, rate
    if reason := why_not(bench.process.device, seconds=bench.request.seconds):
        bench.found.notes["precision.compile_mode" if compiles and bench.keeps("precision.compile") else "precision.compile"] = reason
        return stepper, rate
    # Compare each with the best so far, so that no more than two copies of the networks are in memory at once.
    for variant in _ways_to_compile(bench, own):
        stepper, rate = _try_compiled(bench, stepper, variant, rate=rate)
    return stepper, rate


def num_ways_to_compile(bench: Bench) -> int:
    """Returns how many comparisons with compiled networks there will be at most."""
    own = resolved(bench.found.config.precision, device=bench.process.device)
    if bench.request.seconds < candidates.COMPILE_NEEDS_S or (bench.keeps("precision.compile") and own.compile == "no"):
        return 0
    kept = bench.keeps("precision.compile")  # then the first way is what the others are compared with
    return len(_compiled(bench, own)) - kept


def _compiled(bench: Bench, own: PrecisionConfig) -> dict[str, PrecisionConfig]:
    device, seconds, kept = bench.process.device.type, bench.request.seconds, bench.request.kept
    return candidates.compiled(own, device=device, seconds=seconds, kept=kept, accumulate=bench.accumulate)


def _ways_to_compile(bench: Bench, own: PrecisionConfig) -> list[PrecisionConfig]:
    """Returns the precisions to compare with the best so far, in that order."""
    best = bench.found.config.precision
    wanted = replace(best, compile="yes", compile_mode=own.compile_mode, compile_cache=own.compile_cache)
    return [variant for variant in _compiled(bench, wanted).values() if variant != best]


def _try_compiled(bench: Bench, best: Stepper, variant: PrecisionConfig, *, rate: float) -> tuple[Stepper, float]:
    """Returns the faster of the best so far and the same networks compiled in this variant, and images per second."""
    batch = best.config.global_batch
    name, new = candidates.step_name(best.config.precision), candidates.step_name(variant)
    challenger = bench.stepper(batch, precision=variant)
    trials = [Trial(name, best.alone(bench.sample[0])), Trial(new, _compiling(challenger.alone(bench.sample[0])))]
    comparison = bench.compare(f"step compiled, batch {batch}", trials)
    chosen = bench.found.add(comparison, "precision.compile", "precision.compile_mode")
    if chosen == new and name not in comparison.failed:  # if it left the other one no memory, it has not shown that it is faster
        bench.found.choose(precision=variant)
        return challenger, comparison.rate(new)
    torch.compiler.reset()  # frees its CUDA graphs; the ones still in use come back from the compiler's cache
    return best, comparison.rate(name) if name in comparison.rates else rate


def _compiling(run: Callable[[float], float]) -> Callable[[float], float]:
    """Returns the same work, in which any error of compiling becomes a TrialFailed."""

    def guarded(seconds: float) -> float:
        try:
            return run(seconds)
        except TrialFailed:
            raise
        except Exception as error:  # torch raises a class of its own for each thing that it cannot compile
            raise TrialFailed(f"does not compile ({first_line(error)})") from error

    return guarded


def switches(bench: Bench) -> list[str]:
    """Returns the switches to try on this GPU, which the user has not set; a CPU has none."""
    return [name for name in SWITCHES if bench.on_gpu and not bench.keeps(f"precision.{name}")]


def tune_switches(bench: Bench, stepper: Stepper, names: Sequence[str], *, rate: float) -> tuple[Stepper, float]:
    """Returns networks with each switch as it is fastest, and images per second. Measured last, with everything else as it was chosen."""
    for name in names:
        own = bench.found.config.precision
        other = replace(own, **{name: not getattr(own, name)})
        if name == "cudnn_benchmark":  # a switch of the process: the same networks serve
            challenger = stepper.with_search(search=other.cudnn_benchmark)
        else:
            challenger = bench.stepper(stepper.config.global_batch, precision=other)
        steppers = {_switch(name, own): stepper, _switch(name, other): challenger}
        trials = [Trial(title, _compiling(each.alone(bench.sample[0]))) for title, each in steppers.items()]
        comparison = bench.compare(f"step by precision.{name}, batch {stepper.config.global_batch}", trials)
        chosen = bench.found.add(comparison, f"precision.{name}")
        if chosen == _switch(name, other) and not comparison.failed:
            bench.found.choose(precision=other)
        else:
            chosen = _switch(name, own)
        stepper, rate = steppers[chosen], comparison.rate(chosen) if chosen in comparison.rates else rate
    return stepper, rate


def _switch(name: str, precision: PrecisionConfig) -> str:
    return f"{name} {'on' if getattr(precision, name) else 'off'}"


def update_ways(bench: Bench, *, check: Callable[[str, torch.device], None] = check_update) -> list[str]:
    """Returns the ways to move the target that work on this GPU, the config's own first, and notes why others do not. A CPU has only one."""
    own = bench.found.config.optim.update
    if bench.keeps("optim.update") or not bench.on_gpu:
        return [own]
    ways, missing = [own], []  # the config's own was tried when the networks were built
    for update in candidates.updates(own)[1:]:
        try:
            check(update, bench.process.device)
            ways.append(update)
        except UserError as reason:
            missing.append(str(reason))
    if missing:
        bench.found.notes["optim.update"] = f"images/s per {bench.found.per}; not tried: " + "; ".join(missing)
    return ways


def tune_update(bench: Bench, stepper: Stepper, ways: Sequence[str], *, rate: float) -> tuple[Stepper, float]:
    """Returns the same networks with the fastest of the ways to move the target, and images per second."""
    if len(ways) == 1:
        return stepper, rate
    # The same networks for all: what an update costs does not depend on their weights.
    steppers = {way: stepper.with_update(way) for way in ways}
    trials = [Trial(way, each.alone(bench.sample[0])) for way, each in steppers.items()]
    comparison = bench.compare(f"step by optim.update, batch {stepper.config.global_batch}", trials)
    chosen = bench.found.add(comparison, "optim.update")
    bench.found.choose(optim=replace(bench.found.config.optim, update=chosen))
    return steppers[chosen], comparison.rate(chosen)
