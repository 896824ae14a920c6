"""Compares two records row by row: did something get slower?

python -m benchmarks.compare BEFORE AFTER           each is a records.json or its folder
python -m benchmarks.compare BEFORE AFTER --slower_than 0.05

Exit code: 0 nothing got slower, 1 something got slower, 2 the records cannot be compared.

Compared are each row's time over the ceiling's and over the reference's of the same run, on the case's first clock, because a busier
machine slows all of them; milliseconds of different runs are not compared. A row counts as slower if for both ratios the medians
differ by more than the threshold and the intervals do not overlap: if only the ceiling or the reference changed, only one ratio
changes. A setting that only one of the records has came with a later version of the code: it is named, and taken as what the other version
did without it. The reference row has one ratio, to the ceiling, which shows what slows reference and subject alike. A note is printed if the
machine was much busier in one of the two runs, because other processes slow cache-resident work more than the rest. Extra figures
(memory, shares of time) are not compared.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.record import Row
from benchmarks.record_file import read_record, results_of
from benchmarks.report_text import log_console
from fastbyol.config.arguments import OneLineParser
from fastbyol.config.errors import UserError, one_line_errors, require_positive
from fastbyol.tuning.comparison import Estimate

THRESHOLD = 0.1
SLOWER_EXIT = 1
SLOWER, FASTER, NOISE, SAME = "slower", "faster", "within noise", "same"
LOAD_FACTOR = 2.0
LOAD_NOTE = "other processes that share the caches change even ratios by 10 % and more; measure both again, one after the other"
MACHINE = ("cpu", "cores", "gpu")
MEANING = ("unit", "threads", "primary", "device", "settings")
"""Fields of a case that its figures depend on."""
ONLY_PRECISION = {"rounds", "more_rounds"}
"""Settings that change the precision of a figure but not its meaning."""


@dataclass(frozen=True)
class Yardstick:
    """A row's time over another row's time in the same run, before and after."""

    before: Estimate
    after: Estimate

    @property
    def factor(self) -> float:
        """Ratio of after to before; above 1 if the row got slower."""
        return self.after.median / self.before.median

    def verdict(self, threshold: float) -> str:
        if max(self.factor, 1 / self.factor) <= 1 + threshold:
            return SAME
        if self.factor > 1:
            return SLOWER if self.after.low > self.before.high else NOISE
        return FASTER if self.after.high < self.before.low else NOISE


@dataclass(frozen=True)
class Change:
    """A row that is in both records."""

    case: str
    subject: str
    yardsticks: tuple[Yardstick, ...]

    def verdict(self, threshold: float) -> str:
        """Returns what all ratios agree on; 'within noise' if all moved the same way but not all significantly; else 'same'."""
        verdicts = {yardstick.verdict(threshold) for yardstick in self.yardsticks}
        directions = {yardstick.factor > 1 for yardstick in self.yardsticks}
        if len(verdicts) == 1:
            return verdicts.pop()
        return NOISE if SAME not in verdicts and len(directions) == 1 else SAME


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("before", type=Path, help="records.json of the earlier run, or its folder")
    parser.add_argument("after", type=Path, help="records.json of the later run, or its folder")
    parser.add_argument(
        "--slower_than",
        type=float,
        default=THRESHOLD,
        metavar="SHARE",
        help="smallest relative difference that counts as a change (%(default)s)",
    )
    options = parser.parse_args(arguments)
    require_positive("--slower_than", options.slower_than)
    before, after = read_record(options.before), read_record(options.after)
    require_comparable(before, after)
    changes = compare(before, after)
    _print(before, after, changes, threshold=options.slower_than)
    if any(change.verdict(options.slower_than) == SLOWER for change in changes):
        sys.exit(SLOWER_EXIT)


def require_comparable(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raises UserError that names the first difference which makes the records incomparable."""
    for name in MACHINE:
        _require_equal(f"the machine's {name}", before["provenance"][name], after["provenance"][name])
    if before["quick"] != after["quick"]:
        raise UserError("the records cannot be compared: one has quick settings, the other full ones; measure both alike")
    ours, theirs = ({result.case: result for result in results_of(record)} for record in (before, after))
    common = [name for name in ours if name in theirs]
    if not common:
        raise UserError(f"the records cannot be compared: no case in both (before: {', '.join(ours)}; after: {', '.join(theirs)})")
    for name in common:
        for field in MEANING:
            _require_equal(f"{field} of {name}", getattr(ours[name], field), getattr(theirs[name], field))
        for role in ("reference", "ceiling"):  # they differ if a package was missing in one run
            rows = [result.with_role(role) for result in (ours[name], theirs[name])]
            _require_equal(f"the {role} of {name}", *(row.name if row else "" for row in rows))


def _require_equal(what: str, before: object, after: object) -> None:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted((before.keys() & after.keys()) - ONLY_PRECISION):
            _require_equal(f"{what}, {key}", before[key], after[key])
    elif before != after:
        raise UserError(f"the records cannot be compared: {what} is {before} before and {after} after; measure both alike")


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Returns every row that is in both records and has a ratio; call `require_comparable` first."""
    later = {result.case: result for result in results_of(after)}
    return [
        Change(result.case, row.name, tuple(_yardsticks(row, now, result.primary)))
        for result in results_of(before)
        for row in result.rows
        if result.case in later and not row.role.endswith("ceiling")
        if (now := later[result.case].find(row.name)) is not None
    ]


def _yardsticks(before: Row, after: Row, clock: str) -> Iterator[Yardstick]:
    yield Yardstick(before.over_ceiling[clock], after.over_ceiling[clock])
    if before.role != "reference":
        yield Yardstick(_inverse(before.speedup[clock]), _inverse(after.speedup[clock]))


def _inverse(value: Estimate) -> Estimate:
    return Estimate(1 / value.median, 1 / value.high, 1 / value.low)  # the bounds change places


def settings_of_one(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Returns texts that name the settings, of cases in both records, which only one version of the code had, with their values."""
    ours, theirs = ({result.case: result.settings for result in results_of(record)} for record in (before, after))
    return [text for name in ours if name in theirs for text in _lone_settings(f"settings of {name}", ours[name], theirs[name])]


def _lone_settings(what: str, before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for when, mine, other in (("before", before, after), ("after", after, before)):
        for key in sorted(mine.keys() - other.keys() - ONLY_PRECISION):
            if mine[key] is not None:
                yield f"{what}, {key}: {mine[key]} {when}, unknown to the other version of the code"
    for key in sorted(before.keys() & after.keys()):
        if isinstance(before[key], dict) and isinstance(after[key], dict):
            yield from _lone_settings(f"{what}, {key}", before[key], after[key])


def only_in_one(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Returns texts that name the cases and rows found in only one of the records."""
    named = [{result.case: {row.name for row in result.rows} for result in results_of(record)} for record in (before, after)]
    texts = []
    for when, mine, other in (("before", *named), ("after", *reversed(named))):
        texts += [f"{case}: {when} only" for case in mine if case not in other]
        texts += [f"{case}, {row}: {when} only" for case in mine if case in other for row in sorted(mine[case] - other[case])]
    return texts


def _print(before: dict[str, Any], after: dict[str, Any], changes: list[Change], *, threshold: float) -> None:
    console = log_console()
    console.print(_table(changes, threshold), markup=False)
    for name, version in before["provenance"]["versions"].items():
        now = after["provenance"]["versions"].get(name)
        if now != version:
            console.print(f"note: {name} {version} before, {now or 'missing'} after", markup=False)
    loads = [max(load[0] for load in record["load_average"].values()) for record in (before, after)]
    if max(loads) > LOAD_FACTOR * max(min(loads), 1.0):
        console.print(f"note: load average {loads[0]:.1f} before, {loads[1]:.1f} after: {LOAD_NOTE}", markup=False)
    for text in settings_of_one(before, after):
        console.print(f"note: {text}", markup=False)
    for text in only_in_one(before, after):
        console.print(f"note: not compared: {text}", markup=False)
    verdicts = [change.verdict(threshold) for change in changes]
    console.print(
        f"{len(changes)} rows: {verdicts.count(SLOWER)} slower, {verdicts.count(FASTER)} faster by more than {threshold:.0%}, "
        f"{verdicts.count(NOISE)} moved within the noise, {verdicts.count(SAME)} the same"
    )


def _table(changes: list[Change], threshold: float) -> Table:
    table = Table(title="time over the ceiling's and the reference's of the same run", title_justify="left")
    for title in ("case", "subject", "over ceiling", "change", "over reference", "change", "verdict"):
        table.add_column(title, justify="left" if title in ("case", "subject", "verdict") else "right")
    for change in changes:
        cells = []
        for one in change.yardsticks:
            cells += [f"{one.before.median:.3g} -> {one.after.median:.3g}", f"{one.factor - 1:+.0%}"]
        table.add_row(change.case, change.subject, *cells, *[""] * (4 - len(cells)), change.verdict(threshold))
    return table


if __name__ == "__main__":
    main()
