"""Records as tables: Markdown for report.md, rich for the terminal, from the same cells."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from benchmarks.cases import load_case
from benchmarks.record import CaseResult, Row
from benchmarks.timing import Estimate


def headers(result: CaseResult) -> list[str]:
    """Column titles. A rate says whose it is: a CPU process with so many threads, never a GPU."""
    titles = [
        "subject",
        f"CPU-ms / {result.unit}",
        f"{result.coverage:.0%} interval",
        f"wall-ms / {result.unit}",
        f"speed-up ({result.primary})",
        f"x ceiling ({result.primary})",
    ]
    if result.unit == "image":
        titles.append(f"images/s per CPU process ({_threads(result)})")
    return [*titles, "note"]


def cells(result: CaseResult, row: Row) -> list[str]:
    """The row as texts, one for each header."""
    cpu = row.ms["cpu"]
    values = [
        f"{row.name} ({row.role})" if row.role else row.name,
        _number(cpu.median),
        _interval(cpu),
        _number(row.ms["wall"].median),
        f"{row.speedup[result.primary].median:.2f}",
        f"{row.over_ceiling[result.primary].median:.2f}",
    ]
    if result.unit == "image":
        values.append(_number(1000 / row.ms["wall"].median))
    extra = [f"{name} {_number(value)}" for name, value in row.extra.items()]
    return [*values, "; ".join(filter(None, [row.note, *extra]))]


def case_table(result: CaseResult) -> Table:
    """The case for the terminal."""
    table = Table(title=f"{result.case}: {result.title} ({result.rounds} rounds)", title_justify="left")
    for position, title in enumerate(headers(result)):
        table.add_column(title, justify="left" if position in (0, len(headers(result)) - 1) else "right")
    for row in result.rows:
        table.add_row(*cells(result, row))
    return table


def report_markdown(record: dict[str, Any], results: list[CaseResult]) -> str:
    """report.md: where and when, then each case with its table and its docstring."""
    parts = ["# fastbyol benchmarks", _where(record)]
    parts += [_case_markdown(result) for result in results]
    if record["skipped"]:
        parts.append("## Skipped\n" + "\n".join(f"- {name}: {why}" for name, why in record["skipped"].items()))
    return "\n\n".join(parts) + "\n"


def _where(record: dict[str, Any]) -> str:
    provenance, load = record["provenance"], record["load_average"]
    commit = f"{provenance['commit'] or 'unknown'}{' with uncommitted changes' if provenance['uncommitted_changes'] else ''}"
    lines = [
        f"- `{provenance['command']}`",
        f"- {record['started']}, {record['seconds']:.0f} s, {'quick' if record['quick'] else 'full'} settings, commit {commit}",
        f"- {provenance['cpu']}, {provenance['cores']} cores, GPU: {provenance['gpu'] or 'none'}; {provenance['system']}",
        f"- load average at the start {_loads(load['start'])}, at the end {_loads(load['end'])} (1, 5, 15 min; ours included)",
        "- " + ", ".join(f"{name} {version}" for name, version in provenance["versions"].items()),
        f"- measuring itself costs {1000 * record['measuring_overhead_ms']:.1f} us a sample",
        "",
        "CPU-ms: user and system time of all threads. Figures are medians over interleaved rounds with the interval of order statistics;",
        "speed-up (the reference's time over this one's) and x ceiling (this one's over the ceiling's) are medians of same-round ratios.",
    ]
    return "\n".join(lines)


def _case_markdown(result: CaseResult) -> str:
    titles = headers(result)
    lines = [f"## {result.case}: {result.title}", "", f"{result.rounds} rounds, {_threads(result)}.", "", _line(titles)]
    lines.append(_line(["---"] + ["---:"] * (len(titles) - 2) + ["---"]))
    lines += [_line(cells(result, row)) for row in result.rows]
    if result.skipped:
        lines += ["", *(f"Skipped: {name}: {why}" for name, why in result.skipped.items())]
    return "\n".join([*lines, "", (load_case(result.case).__doc__ or "").strip()])


def _threads(result: CaseResult) -> str:
    return f"{result.threads} thread{'s' if result.threads > 1 else ''}"


def _line(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _interval(value: Estimate) -> str:
    return f"{_number(value.low)} .. {_number(value.high)}"


def _number(value: float) -> str:
    """Three significant digits, no exponent for what a table holds."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def _loads(values: list[float]) -> str:
    return " ".join(f"{value:.1f}" for value in values)
