"""The result of a benchmark case, as plain values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.timing import CLOCKS, Subject, Timings, same_round_ratios
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

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def named(self, role: str) -> str:
        """Returns the name of the row with that role, or ''."""
        return next((row.name for row in self.rows if row.role == role), "")

    def find(self, name: str) -> Row | None:
        """Returns the row of that name, or None if it was not measured."""
        return next((row for row in self.rows if row.name == name), None)


def _estimates(by_clock: dict[str, dict[str, float]]) -> dict[str, Estimate]:
    return {clock: Estimate(**value) for clock, value in by_clock.items()}


def make_result(
    case: str,
    title: str,
    subjects: Sequence[Subject],
    timings: dict[str, Timings],
    *,
    reference: str,
    ceiling: str,
    threads: int,
    settings: Any,
    unit: str = "image",
    primary: str = "cpu",
    extra: dict[str, dict[str, float]] | None = None,
    skipped: dict[str, str] | None = None,
    device: str = "cpu",
) -> CaseResult:
    """Builds the rows of all subjects in order, each compared with the subjects named as reference and ceiling.

    Args:
        case: the case's name on the command line.
        title: one line for the head of the table.
        subjects: the subjects that were timed.
        timings: result of `measure` for them.
        reference: name of the subject that speed-ups are relative to.
        ceiling: name of the subject that nothing can be faster than.
        threads: number of threads that a subject may use.
        settings: a dataclass with everything the figures depend on.
        unit: name of the unit, singular.
        primary: 'cpu' or 'wall'.
        extra: further figures by subject.
        skipped: what was left out, with the reason.
        device: 'cpu' or 'cuda', where the subjects ran.
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
            extra=(extra or {}).get(subject.name, {}),
        )
        for subject in subjects
    )
    rounds = len(timings[reference].ms[primary])
    return CaseResult(
        case=case,
        title=title,
        unit=unit,
        threads=threads,
        primary=primary,
        rounds=rounds,
        coverage=interval_coverage(rounds, drop=dropped_extremes(rounds)),
        settings=to_plain(settings),
        rows=rows,
        skipped=skipped or {},
        device=device,
    )


def _ratios(numerator: Timings, denominator: Timings) -> dict[str, Estimate]:
    return {clock: same_round_ratios(numerator.ms[clock], denominator.ms[clock]) for clock in CLOCKS}
