"""Times subjects in interleaved rounds (`fastbyol.tuning.comparison`) by two clocks.

The CPU clock (user + system time of all threads of this process and of its finished children) is hardly affected by other load; the
wall clock is, and it is what a user waits for.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from types import MappingProxyType

import torch

from fastbyol.config.errors import require, require_at_least
from fastbyol.tuning.comparison import Estimate, estimate, take_turns


def cpu_seconds() -> float:
    """Returns CPU seconds of this process, of its finished children, and those added by `count_cpu_seconds`."""
    # One clock for all subjects: converters work in child processes, loaders in threads, and some rivals in both.
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime + _elsewhere_s


def count_cpu_seconds(seconds: float) -> None:
    """Adds CPU seconds that another, still running process has spent on our behalf."""
    global _elsewhere_s
    # The system adds the time of a child to RUSAGE_CHILDREN only when it has ended.
    _elsewhere_s += seconds


_elsewhere_s = 0.0
CLOCKS: dict[str, Callable[[], float]] = {"cpu": cpu_seconds, "wall": time.perf_counter}


@dataclass(frozen=True)
class Subject:
    """A piece of work to be timed. It is called repeatedly, so it must leave everything ready for the next call."""

    name: str
    run: Callable[[], object]
    units: float = 1.0
    """Number of images, updates, ... per call."""
    calls: int = 1
    """Calls per round, enough for several milliseconds."""
    note: str = ""
    role: str = ""
    """'rival' for another implementation, 'memory ceiling' for a second ceiling; the case names the reference and the ceiling."""
    prepare: Callable[[], object] = lambda: None
    """Called before the clocks start, each round."""


def subjects_of(
    work: Mapping[str, Callable[[], object]],
    *,
    units: float = 1.0,
    calls: int = 1,
    notes: Mapping[str, str] = MappingProxyType({}),
    rivals: Collection[str] = (),
) -> list[Subject]:
    """Returns the pieces of work as subjects, in order; `notes` and `rivals` go by name."""
    return [
        Subject(name, run, units=units, calls=calls, note=notes.get(name, ""), role="rival" if name in rivals else "")
        for name, run in work.items()
    ]


@dataclass(frozen=True)
class Timings:
    """Milliseconds per unit of one subject, one value per round, by clock ('cpu', 'wall')."""

    ms: dict[str, tuple[float, ...]]


def measure(
    subjects: Sequence[Subject], *, rounds: int, warmup: int = 1, warmed_up: Callable[[], object] = lambda: None
) -> dict[str, Timings]:
    """Times every subject once per round, in order, after `warmup` untimed rounds; returns the timings by name.

    6 or more rounds give a 95 % interval. `warmed_up` is called before them, for subjects that keep counts of their own.
    """
    require_at_least("rounds", rounds, 1)
    names = [subject.name for subject in subjects]
    # Records, figures and reports find a row by its name.
    require(len(set(names)) == len(names) > 0, "subjects", names, "at least one, with different names")
    samples = {subject.name: partial(_time_once, subject) for subject in subjects}
    # Whole rounds, in the order of the timed ones: each subject also evicts the caches that the next one finds.
    take_turns(samples, _rounds(warmup))
    warmed_up()
    taken, _ = take_turns(samples, _rounds(rounds))
    return {name: Timings({clock: tuple(sample[clock] for sample in values) for clock in CLOCKS}) for name, values in taken.items()}


def _rounds(num: int) -> Iterator[int]:
    for number in range(num):
        gc.collect()  # once a round: it takes 0.1 s where torch is loaded
        yield number


def _time_once(subject: Subject) -> dict[str, float]:
    subject.prepare()
    start = {clock: now() for clock, now in CLOCKS.items()}
    for _ in range(subject.calls):
        subject.run()
    return {clock: 1000 * (now() - start[clock]) / (subject.calls * subject.units) for clock, now in CLOCKS.items()}


def same_round_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Estimate:
    """Returns the median of the ratios taken within each round."""
    # A ratio of medians would set one subject's quiet round against another's busy one.
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
