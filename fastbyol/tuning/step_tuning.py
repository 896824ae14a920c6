"""The step alone: number format and memory layout, the batch that fits memory, compilation.

Never run by us on a GPU yet: there the search for the batch and fp16 join in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastbyol.config.errors import UserError
from fastbyol.tuning import candidates
from fastbyol.tuning.bench import Bench
from fastbyol.tuning.comparison import MIN_ROUNDS, Trial, TrialFailed
from fastbyol.tuning.memory import fits_memory, release_memory, those_that_fit
from fastbyol.tuning.step_trial import Stepper

SMALLEST_CPU_BATCH = 8


def tune_step(bench: Bench) -> tuple[Stepper, float]:
    """The networks in the best precision and batch, and images per second of the step alone."""
    if not bench.keeps("precision.compile"):
        bench.found.choose(precision=replace(bench.found.config.precision, compile=False))
    # Half of what fits: float32 takes twice the memory of bf16, and the networks of several candidates are there at once.
    batch = fitting_batches(bench)[-2:][0] if bench.on_gpu else quick_batch(bench)
    rate = _tune_precision(bench, batch)
    if bench.on_gpu:
        stepper, rate = tune_rank_batch(bench)
    else:
        stepper = Stepper(bench.trial_config(batch), bench.process)
    return _tune_compile(bench, stepper, eager_rate=rate)


def _tune_precision(bench: Bench, batch: int) -> float:
    """Chooses number format and memory layout; images per second with them."""
    variants = candidates.precisions(bench.found.config.precision, device=bench.process.device.type, kept=bench.request.kept)
    steppers = {name: Stepper(bench.trial_config(batch, precision=variant), bench.process) for name, variant in variants.items()}
    trials = [Trial(name, stepper.alone(bench.sample[0])) for name, stepper in steppers.items()]
    comparison = bench.compare(f"step alone, batch {batch}", trials)
    chosen = bench.found.add(comparison, "precision.autocast", "precision.channels_last")
    bench.found.choose(precision=variants[chosen])
    return comparison.rate(chosen)


def quick_batch(bench: Bench) -> int:
    """The most images whose step is short enough for every candidate's rounds; on a CPU a whole batch may take minutes, or all memory."""
    longest_s = bench.request.seconds / (MIN_ROUNDS * 4)  # two number formats in two layouts
    first = min(SMALLEST_CPU_BATCH, bench.micro_batch)
    stepper = Stepper(bench.trial_config(first), bench.process)
    stepper.alone(bench.sample[0])(0.0)

    def is_quick(batch: int) -> bool:
        return batch == first or batch / stepper.with_batch(batch).alone(bench.sample[0])(0.0) <= longest_s

    return those_that_fit(candidates.doubled_batches(first, most=bench.micro_batch), is_quick)[-1]


def fitting_batches(bench: Bench) -> list[int]:
    """Images of one forward that fit the device in the precision so far, ascending; the given one alone where it is to be kept.

    Raises:
        UserError: not even the smallest fits.
    """
    release_memory()  # of the candidates before
    wanted = [bench.micro_batch] if bench.keeps("rank_batch") else candidates.rank_batches(bench.share)
    precision = bench.found.config.precision
    bench.announce(f"rank_batch that fits {bench.process.device} in {precision.autocast}: {', '.join(map(str, wanted))}")
    stepper = Stepper(bench.trial_config(wanted[0], precision=replace(precision, compile=False)), bench.process)

    def fits(batch: int) -> bool:
        run = stepper.with_batch(batch).alone(bench.sample[0])
        return fits_memory(lambda: (run(0.0), run(0.0)), bench.process.device)

    fitting = those_that_fit(wanted, fits)
    if not fitting:
        raise UserError(f"rank_batch = {wanted[0]}: does not fit the GPU's memory; take a smaller encoder or views.size_px")
    return fitting


def tune_rank_batch(bench: Bench) -> tuple[Stepper, float]:
    """The networks with the fastest of the largest batches that fit, and images per second; each candidate does the images of the largest
    before it updates."""
    largest, *smaller = fitting_batches(bench)[-3:][::-1]
    stepper = Stepper(bench.trial_config(largest), bench.process)
    batches = [largest, *(batch for batch in smaller if largest % batch == 0)]
    trials = [Trial(str(batch), stepper.with_batch(largest, rank_batch=batch).alone(bench.sample[0])) for batch in batches]
    comparison = bench.compare("step alone, rank_batch", trials)
    chosen = bench.found.add(comparison, "rank_batch")
    bench.found.choose(rank_batch=int(chosen))
    return stepper.with_batch(int(chosen)), comparison.rate(chosen)


def _tune_compile(bench: Bench, stepper: Stepper, *, eager_rate: float) -> tuple[Stepper, float]:
    """The same networks, compiled where that can be tried and is faster; and images per second."""
    if bench.keeps("precision.compile"):
        return stepper, eager_rate
    if reason := candidates.reason_not_to_compile(bench.process.device, seconds=bench.request.seconds):
        bench.found.notes["precision.compile"] = reason
        return stepper, eager_rate
    batch, precision = stepper.config.global_batch, replace(bench.found.config.precision, compile=True)
    compiled = Stepper(bench.trial_config(batch, precision=precision), bench.process)
    trials = [Trial("eager", stepper.alone(bench.sample[0])), Trial("compiled", _compiling(compiled.alone(bench.sample[0])))]
    comparison = bench.compare(f"step compiled, batch {batch}", trials)
    chosen = bench.found.add(comparison, "precision.compile")
    if chosen == "compiled":
        bench.found.choose(precision=precision)
        return compiled, comparison.rate(chosen)
    return stepper, comparison.rate(chosen)


def _compiling(run: Callable[[float], float]) -> Callable[[float], float]:
    """The same work; whatever goes wrong while it is compiled is a reason not to compile."""

    def guarded(seconds: float) -> float:
        try:
            return run(seconds)
        except TrialFailed:
            raise
        except Exception as error:  # torch raises a class of its own for each thing that it cannot compile
            raise TrialFailed(f"does not compile ({candidates.first_line(error)})") from error

    return guarded
