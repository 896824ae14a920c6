"""Times several ways to do the same work in turns, estimates medians with their intervals, and picks one.

Rounds go A B C A B C and ratios are taken within a round, so that another job on the machine slows down all candidates alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import TypeVar

from fastbyol.config.errors import UserError

Value = TypeVar("Value")
CONFIDENCE = 0.95
ROUNDS, MIN_ROUNDS = 5, 3
MARGIN = 0.03
"""A candidate within this share of the fastest counts as equally fast: such a difference is not worth a change of settings."""
WARMUPS = 2
"""Untimed rounds: compilation and allocation happen in the first call, and some of them in the second."""


class TrialFailed(Exception):
    """Raised by a candidate that cannot be used here; the message is the reason."""


@dataclass(frozen=True)
class Trial:
    """A candidate: `run(seconds)` works for about that long, at least one unit of its work, and returns images per second."""

    name: str
    run: Callable[[float], float]


@dataclass(frozen=True)
class Comparison:
    """The result: images per second of each candidate, one value a round; `failed` holds the reasons of those that could not be measured.

    reference: the name of the one that cannot be chosen; it shows what the others could reach at most.
    """

    title: str
    rates: Mapping[str, tuple[float, ...]]
    failed: Mapping[str, str] = field(default_factory=dict)
    reference: str = ""

    @property
    def best(self) -> str:
        """The first candidate that the fastest does not beat by more than `MARGIN` in every round (5 rounds do so by chance 1 time in 32)."""
        candidates = {name: rates for name, rates in self.rates.items() if name != self.reference}
        fastest = candidates[max(candidates, key=self.rate)]
        return next(name for name, rates in candidates.items() if any(a >= (1 - MARGIN) * b for a, b in zip(rates, fastest, strict=True)))

    def rate(self, name: str) -> float:
        """Returns a candidate's median images per second."""
        return estimate(self.rates[name]).median

    @property
    def summary(self) -> str:
        """All figures in one line."""
        measured = [f"{name} {self.rate(name):,.0f}" for name in self.rates]
        return f"{self.title}: " + ", ".join([*measured, *(f"{name} {reason}" for name, reason in self.failed.items())])


def compare(title: str, trials: Sequence[Trial], *, seconds: float, clock: Callable[[], float] = time.perf_counter) -> Comparison:
    """Times every candidate, given in order of preference, once a round; UserError if all of them fail.

    `seconds` is the time for all rounds together. Warming up comes on top, and slow candidates take longer because there are at least
    `MIN_ROUNDS`.
    """
    _, failed = take_turns({trial.name: partial(trial.run, 0.0) for trial in trials}, range(WARMUPS))
    usable = [trial for trial in trials if trial.name not in failed]
    each_s = seconds / (ROUNDS * max(1, len(usable)))
    # A candidate that has warmed up may still fail, if the next one has taken the memory.
    rates, late = take_turns({trial.name: partial(trial.run, each_s) for trial in usable}, _rounds(seconds, clock))
    failed |= late
    if not rates:
        raise UserError(f"{title}: nothing works here: " + "; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    return Comparison(title, rates, failed)


def _rounds(seconds: float, clock: Callable[[], float]) -> Iterator[int]:
    start = clock()
    for number in range(ROUNDS):
        if number >= MIN_ROUNDS and clock() - start >= seconds:
            return
        yield number


def take_turns(samples: Mapping[str, Callable[[], Value]], rounds: Iterable[object]) -> tuple[dict[str, tuple[Value, ...]], dict[str, str]]:
    """Calls every function once a round, in order; one that raises TrialFailed is not called again.

    Returns the values of those that never failed, one a round, and the reasons of the others.
    """
    values: dict[str, list[Value]] = {name: [] for name in samples}
    failed: dict[str, str] = {}
    for _ in rounds:
        for name in [name for name in samples if name not in failed]:
            try:
                values[name].append(samples[name]())
            except TrialFailed as reason:
                failed[name] = str(reason)
    return {name: tuple(taken) for name, taken in values.items() if name not in failed}, failed


@dataclass(frozen=True)
class Estimate:
    """A median with its confidence interval."""

    median: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the median and the order statistics that enclose it with `CONFIDENCE` (the extremes if there are too few values for that)."""
    ordered = sorted(values)
    drop = dropped_extremes(len(ordered))
    return Estimate(median(ordered), ordered[drop], ordered[-1 - drop])


def dropped_extremes(num: int) -> int:
    """Returns how many of `num` sorted values can be dropped at each end so that the rest still encloses the median with `CONFIDENCE`."""
    # Any one value lies below the true median with probability 1/2, so the number of those that do is binomial.
    drop = 0
    while 2 * (drop + 1) < num and interval_coverage(num, drop=drop + 1) >= CONFIDENCE:
        drop += 1
    return drop


def interval_coverage(num: int, *, drop: int) -> float:
    """Returns the probability that the true median of any distribution lies between the extremes left after dropping `drop` at each end."""
    return 1 - 2 * sum(math.comb(num, k) for k in range(drop + 1)) / 2**num
