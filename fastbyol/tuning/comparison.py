"""Times several ways to do the same work in turns, and picks one.

Rounds go A B C A B C and ratios are taken within a round, so that another job on the machine slows down all candidates alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from fastbyol.config.errors import UserError

ROUNDS, MIN_ROUNDS = 5, 3
MARGIN = 0.03
"""A candidate within this share of the fastest counts as equally fast: such a difference is not worth a change of settings."""
WARMUPS = 2
"""Untimed calls: compilation and allocation happen in the first call, and some of them in the second."""


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
        return median(self.rates[name])

    @property
    def summary(self) -> str:
        """All figures in one line."""
        measured = [f"{name} {self.rate(name):,.0f}" for name in self.rates]
        return f"{self.title}: " + ", ".join([*measured, *(f"{name} {reason}" for name, reason in self.failed.items())])


def compare(title: str, trials: Sequence[Trial], *, seconds: float, clock: Callable[[], float] = time.perf_counter) -> Comparison:
    """Times every candidate once a round.

    Args:
        title: what is compared.
        trials: the candidates in order of preference: the first of those that are equally fast is the best.
        seconds: time for all rounds together. Warming up comes on top, and slow candidates take longer because there are at least `MIN_ROUNDS`.
        clock: returns seconds.

    Raises:
        UserError: every candidate failed.
    """
    usable, failed = _warmed_up(trials)
    rates: dict[str, list[float]] = {trial.name: [] for trial in usable}
    each_s, start = seconds / (ROUNDS * max(1, len(usable))), clock()
    for number in range(ROUNDS):
        if number >= MIN_ROUNDS and clock() - start >= seconds:
            break
        for trial in [trial for trial in usable if trial.name not in failed]:
            try:
                rates[trial.name].append(trial.run(each_s))
            except TrialFailed as reason:  # one that has warmed up may find the memory taken by the next one
                failed[trial.name] = str(reason)
    measured = {name: tuple(values) for name, values in rates.items() if name not in failed}
    if not measured:
        raise UserError(f"{title}: nothing works here: " + "; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    return Comparison(title, measured, failed)


def _warmed_up(trials: Sequence[Trial]) -> tuple[list[Trial], dict[str, str]]:
    """Returns the candidates that work, and the reasons of those that do not."""
    usable, failed = [], {}
    for trial in trials:
        try:
            for _ in range(WARMUPS):
                trial.run(0.0)
            usable.append(trial)
        except TrialFailed as reason:
            failed[trial.name] = str(reason)
    return usable, failed
