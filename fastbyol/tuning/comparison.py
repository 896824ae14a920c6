"""Several ways to do the same work, timed in turns, and the one to take.

Rounds go A B C A B C and ratios are taken within a round: a neighbour who comes or leaves slows down all that are compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from fastbyol.config.errors import UserError

ROUNDS, MIN_ROUNDS = 5, 3
MARGIN = 0.03
"""A candidate this close to the fastest is as fast: such a difference is not worth a change."""
WARMUPS = 2
"""Compilation and allocation take the first call, and some of them the second."""


class TrialFailed(Exception):
    """This candidate cannot be used here; the message is the reason."""


@dataclass(frozen=True)
class Trial:
    """A candidate: `run(seconds)` works for about that long, at least one unit of its work, and returns images per second."""

    name: str
    run: Callable[[float], float]


@dataclass(frozen=True)
class Comparison:
    """What was measured: images per second of each candidate, one value a round; `failed` holds why the others have none.

    reference: the one among them that is no candidate, but what the others could reach at most.
    """

    title: str
    rates: Mapping[str, tuple[float, ...]]
    failed: Mapping[str, str] = field(default_factory=dict)
    reference: str = ""

    @property
    def best(self) -> str:
        """The first of the candidates that the fastest does not beat, by more than `MARGIN`, in every round (by chance: 1 of 32 times in 5)."""
        candidates = {name: rates for name, rates in self.rates.items() if name != self.reference}
        fastest = candidates[max(candidates, key=self.rate)]
        return next(name for name, rates in candidates.items() if any(a >= (1 - MARGIN) * b for a, b in zip(rates, fastest, strict=True)))

    def rate(self, name: str) -> float:
        """Median images per second of a candidate."""
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
        trials: in order of preference: of those that are equally fast the first is the best.
        seconds: for all rounds together. Warming up comes on top, and so does what `MIN_ROUNDS` rounds of slow work take longer.
        clock: in seconds.

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
    """The candidates that work, and why the others do not."""
    usable, failed = [], {}
    for trial in trials:
        try:
            for _ in range(WARMUPS):
                trial.run(0.0)
            usable.append(trial)
        except TrialFailed as reason:
            failed[trial.name] = str(reason)
    return usable, failed
