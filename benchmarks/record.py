"""The result of a benchmark case, as plain values for JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.timing import CLOCKS, Subject, Timings, measure, same_round_ratios
from fastbyol.config.errors import require_choice
from fastbyol.config.plain import to_plain
from fastbyol.tuning.comparison import Estimate, dropped_extremes, estimate, interval_coverage


@dataclass(frozen=True)
class Row:
    """Figures of one subject. The dicts are keyed by clock, 'cpu' and 'wall'."""

    name: str
    role: str
    """'reference', 'ceiling', 'memory ceiling' (a second one), 'rival' for other implementations beside the reference, or '' for ours."""
    ms: dict[str, Estimate]
    """Milliseconds per unit."""
    speedup: dict[str, Estimate]
    """The reference's time over this subject's, within each round."""
    over_ceiling: dict[str, Estimate]
    """This subject's time over the ceiling's, within each round."""
    note: str = ""
    extra: dict[str, float] = field(default_factory=dict)
    """Other figures of this subject; the name includes the unit."""


@dataclass(frozen=True)
class CaseResult:
    """The result of one case."""

    case: str
    title: str
    unit: str
    """Unit that the milliseconds are per: 'image' (two views of it), 'update', ..."""
    threads: int
    primary: str
    """The main clock of the case."""
    rounds: int
    coverage: float
    """Confidence level of the intervals."""
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    """Names of what could not be measured on this machine, with the reason."""
    device: str = "cpu"
    """Device that rates are per: 'cpu' or 'cuda'."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CaseResult:
        """Builds a result from the output of `as_dict`, read back from JSON."""
        rows = tuple(
            Row(**{**row, **{name: _estimates(row[name]) for name in ("ms", "speedup", "over_ceiling")}}) for row in values["rows"]
        )
        return cls(**{**values, "rows": rows})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def find(self, name: str) -> Row | None:
        """Returns the row of that name, or None if it was not measured."""
        return next((row for row in self.rows if row.name == name), None)

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def with_role(self, role: str) -> Row | None:
        """Returns the row with that role, or None; every measured case has one 'reference' and one 'ceiling'."""
        return next((row for row in self.rows if row.role == role), None)

    def with_extra(self, extra: Mapping[str, Mapping[str, float]], **fields: Any) -> CaseResult:
        """Returns a copy with further figures, by row, and with the given fields replaced."""
        rows = tuple(replace(row, extra={**row.extra, **extra.get(row.name, {})}) for row in self.rows)
        return replace(self, rows=rows, **fields)


def _estimates(by_clock: dict[str, dict[str, float]]) -> dict[str, Estimate]:
    return {clock: Estimate(**value) for clock, value in by_clock.items()}


def measured(
    case: str,
    title: str,
    subjects: Sequence[Subject],
    *,
    settings: Any,
    warmup: int = 1,
    warmed_up: Callable[[], object] = lambda: None,
    **given: Any,
) -> CaseResult:
    """Times the subjects for `settings.rounds` rounds and returns `make_result` of the timings, with what else it is given."""
    timings = measure(subjects, rounds=settings.rounds, warmup=warmup, warmed_up=warmed_up)
    return make_result(case, title, subjects, timings, settings=settings, **given)


def make_result(
    case: str,
    title: str,
    subjects: Sequence[Subject],
    timings: dict[str, Timings],
    *,
    reference: str,
    ceiling: str,
    settings: Any,
    threads: int = 1,
    unit: str = "image",
    primary: str = "cpu",
    skipped: dict[str, str] | None = None,
    device: str = "cpu",
) -> CaseResult:
    """Builds the rows of all subjects in order, each compared with the ones named as reference and ceiling.

    `settings` is a dataclass with everything that the figures depend on; `threads` is how many a subject may use.
    """
    require_choice("primary", primary, tuple(CLOCKS))
    roles = {reference: "reference", ceiling: "ceiling"}
    rows = tuple(
        Row(
            name=subject.name,
            role=roles.get(subject.name, subject.role),
            ms={clock: estimate(values) for clock, values in timings[subject.name].ms.items()},
            speedup=_ratios(timings[reference], timings[subject.name]),
            over_ceiling=_ratios(timings[subject.name], timings[ceiling]),
            note=subject.note,
        )
        for subject in subjects
    )
    rounds = len(timings[reference].ms[primary])
    coverage = interval_coverage(rounds, drop=dropped_extremes(rounds))
    return CaseResult(case, title, unit, threads, primary, rounds, coverage, to_plain(settings), rows, skipped or {}, device)


def _ratios(numerator: Timings, denominator: Timings) -> dict[str, Estimate]:
    return {clock: same_round_ratios(numerator.ms[clock], denominator.ms[clock]) for clock in CLOCKS}
