"""Timing in interleaved rounds, with two clocks and order statistics, so that load on a shared machine affects all subjects of a round
alike.

Rounds run A B C A B C. Ratios of two subjects are taken within each round and their median is reported, so other load on the machine
changes both terms. The CPU clock (user + system time of all threads of this process and of its finished children) is hardly affected
by other load; the wall clock is, and it is what a user waits for.
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
    """Returns CPU seconds of this process, of its finished children, and those added by `count_cpu_seconds`."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime + _elsewhere_s


def count_cpu_seconds(seconds: float) -> None:
    """Adds CPU seconds that another, still running process has spent on our behalf."""
    global _elsewhere_s
    _elsewhere_s += seconds


_elsewhere_s = 0.0
CLOCKS: dict[str, Callable[[], float]] = {"cpu": cpu_seconds, "wall": time.perf_counter}
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Subject:
    """A piece of work to be timed.

    Args:
        name: name in the table.
        run: the work, without set-up; it is called repeatedly, so it must leave everything ready for the next call.
        units: number of images, updates, ... per call.
        calls: calls per round, enough for several milliseconds.
        note: what differs from the other subjects.
        role: 'rival' for another implementation, 'memory ceiling' for a second ceiling; the case itself names the reference and the
            ceiling.
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
    """Milliseconds per unit of one subject, one value per round, by clock ('cpu', 'wall')."""

    ms: dict[str, tuple[float, ...]]


def measure(
    subjects: Sequence[Subject], *, rounds: int, warmup: int = 1, warmed_up: Callable[[], object] = lambda: None
) -> dict[str, Timings]:
    """Times every subject once per round, in order; returns the timings by name.

    Args:
        subjects: at least one, with different names.
        rounds: number of timed rounds; 6 or more give a 95 % interval.
        warmup: number of untimed rounds before them, for compilation, first touch of memory and the file cache.
        warmed_up: called after the warm-up; subjects that keep their own counts reset them here.
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
    """Returns the median and the order statistics that enclose it with `CONFIDENCE` (the extremes if there are too few values for that)."""
    ordered = sorted(values)
    drop = dropped_extremes(len(ordered))
    return Estimate(median(ordered), ordered[drop], ordered[-1 - drop])


def dropped_extremes(num: int) -> int:
    """Returns how many of `num` sorted values can be dropped at each end so that the rest still encloses the median with `CONFIDENCE`."""
    drop = 0
    while 2 * (drop + 1) < num and interval_coverage(num, drop=drop + 1) >= CONFIDENCE:
        drop += 1
    return drop


def interval_coverage(num: int, *, drop: int) -> float:
    """Returns the probability that the true median lies between the order statistics left after dropping `drop` at each end; valid for
    any distribution.
    """
    return 1 - 2 * sum(math.comb(num, k) for k in range(drop + 1)) / 2**num


def same_round_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Estimate:
    """Returns the median of the ratios taken within each round."""
    return estimate([a / b for a, b in zip(numerator, denominator, strict=True)])


def measuring_overhead_ms(*, rounds: int = 100) -> float:
    """Returns the median wall time of a sample of a subject that does nothing: the cost of the two clocks and the call."""
    nothing = Subject("nothing", lambda: None)
    return median(_time_once(nothing)["wall"] for _ in range(rounds))


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Sets the number of torch's threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
