"""Interleaved rounds, two clocks, and order statistics: what a shared machine does to one subject in a round it does to all of them.

Rounds go A B C A B C, so a ratio of two subjects is taken within each round, and the median of these ratios is reported: a neighbour who
comes or leaves moves both of its terms. The CPU clock (user + system, all threads of this process, and its children that have ended) hardly feels
neighbours; the wall clock does, and is what a user waits for.
"""

from __future__ import annotations

import gc
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch

from fastbyol.config.errors import require, require_at_least


def cpu_seconds() -> float:
    """Of this process, of the children that it has waited for, and what `count_cpu_seconds` was told."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime + _elsewhere_s


def count_cpu_seconds(seconds: float) -> None:
    """Adds what another process, which goes on living, has worked for us."""
    global _elsewhere_s
    _elsewhere_s += seconds


_elsewhere_s = 0.0
CLOCKS: dict[str, Callable[[], float]] = {"cpu": cpu_seconds, "wall": time.perf_counter}
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Subject:
    """A piece of work to be timed.

    Args:
        name: as in the table.
        run: the work, without set-up; called again and again, so it leaves everything as it can be called again.
        units: images, updates, ... that one call does.
        calls: calls in one round: enough for several milliseconds.
        note: what differs from the other subjects.
        role: 'rival' for others' way to do the work, 'memory ceiling' for a second ceiling; the reference and the ceiling are named by the case.
    """

    name: str
    run: Callable[[], object]
    units: float = 1.0
    calls: int = 1
    note: str = ""
    role: str = ""


@dataclass(frozen=True)
class Estimate:
    """A median with its confidence interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timings:
    """Milliseconds per unit of one subject, one value a round, by clock ('cpu', 'wall')."""

    ms: dict[str, tuple[float, ...]]


def measure(
    subjects: Sequence[Subject], *, rounds: int, warmup: int = 1, warmed_up: Callable[[], object] = lambda: None
) -> dict[str, Timings]:
    """Times every subject once a round, in order; by name.

    Args:
        subjects: at least one, each with a name of its own.
        rounds: that count; 6 or more give a 95 % interval.
        warmup: rounds before them that do not: compilation, first touch of memory, file cache.
        warmed_up: called between the two: what a subject counts by itself begins here.
    """
    require_at_least("rounds", rounds, 1)
    names = [subject.name for subject in subjects]
    require(len(set(names)) == len(names) > 0, "subjects", names, "at least one, with different names")
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        gc.collect()  # once a round: it takes 0.1 s where torch is loaded
        if number == warmup:
            warmed_up()
        for subject in subjects:
            sample = _time_once(subject)
            if number >= warmup:
                samples[subject.name].append(sample)
    return {name: Timings({clock: tuple(s[clock] for s in taken) for clock in CLOCKS}) for name, taken in samples.items()}


def _time_once(subject: Subject) -> dict[str, float]:
    start = {clock: now() for clock, now in CLOCKS.items()}
    for _ in range(subject.calls):
        subject.run()
    return {clock: 1000 * (now() - start[clock]) / (subject.calls * subject.units) for clock, now in CLOCKS.items()}


def estimate(values: Sequence[float]) -> Estimate:
    """The median and the order statistics that enclose it with `CONFIDENCE` (the extremes where there are too few values for that)."""
    ordered = sorted(values)
    drop = dropped_extremes(len(ordered))
    return Estimate(median(ordered), ordered[drop], ordered[-1 - drop])


def dropped_extremes(num: int) -> int:
    """How many values may be left out at each end of `num` sorted ones, the rest still enclosing the median with `CONFIDENCE`."""
    drop = 0
    while 2 * (drop + 1) < num and interval_coverage(num, drop=drop + 1) >= CONFIDENCE:
        drop += 1
    return drop


def interval_coverage(num: int, *, drop: int) -> float:
    """Probability that the true median lies between the order statistics left after `drop` at each end; holds for any distribution."""
    return 1 - 2 * sum(math.comb(num, k) for k in range(drop + 1)) / 2**num


def same_round_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Estimate:
    """The median of the ratios taken within each round."""
    return estimate([a / b for a, b in zip(numerator, denominator, strict=True)])


def measuring_overhead_ms(*, rounds: int = 100) -> float:
    """Median wall time of one sample of a subject that does nothing: what the two clocks and the call cost."""
    nothing = Subject("nothing", lambda: None)
    return median(_time_once(nothing)["wall"] for _ in range(rounds))


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch computes with this many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
