"""What the doctor finds, one line each, and how the lines are printed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

STATES = ("ok", "low", "missing", "broken")
"""ok: works. low: works, but slower or smaller than a run may want. missing: not installed or not there. broken: there, and does not work."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. text: what was found, and what a missing part costs; way_out: the command or change that helps, or ''."""

    group: str
    name: str
    state: str
    text: str
    way_out: str = ""

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"state = {self.state!r}: must be one of {', '.join(STATES)}")


def lines(findings: Iterable[Finding]) -> Iterator[str]:
    """Yields the report: a heading for each group, a line for each finding, and below it what helps."""
    for group, members in groupby(findings, key=lambda finding: finding.group):
        yield group
        for finding in members:
            yield f"  {finding.state:<8} {finding.name:<22} {finding.text}".rstrip()
            if finding.way_out:
                yield f"  {'':<8} {'':<22} -> {finding.way_out}"


def summary(findings: Iterable[Finding]) -> str:
    """Returns the last line: how many are in each state, and the names of what is broken."""
    found = list(findings)
    counts = ", ".join(f"{sum(finding.state == state for finding in found)} {state}" for state in STATES)
    broken = [finding.name for finding in found if finding.state == "broken"]
    return f"{counts}: {'does not work: ' + ', '.join(broken) if broken else 'all that is installed works'}"
