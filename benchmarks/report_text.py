"""Formats records as text: the tables of the terminal and of report.md, from the same headers and cells as those of report.html."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cases import case_docstring
from benchmarks.record import CaseResult, Row
from fastbyol.tuning.comparison import Estimate

HOW_TO_READ = """CPU-ms: user and system time of all threads. Figures are medians over interleaved rounds with the interval of order statistics;
speed-up (the reference's time over this one's) and x ceiling (this one's over the ceiling's) are medians of same-round ratios. Every subject runs
at least one whole untimed round first: set-up, compilation and the first touch of memory and files are not included in any figure."""
LOG_COLUMNS = 180
QUICK = "Quick settings: small sizes and few rounds, to check that everything runs and to find gross errors. Do not quote these figures; use full settings."


def headers(result: CaseResult) -> list[str]:
    """Returns the column titles. A rate says what it is per: a CPU process with so many threads, or a GPU."""
    titles = [
        "subject",
        f"CPU-ms / {result.unit}",
        f"{result.coverage:.0%} interval",
        f"wall-ms / {result.unit}",
        f"speed-up ({result.primary})",
        f"x ceiling ({result.primary})",
    ]
    if result.unit == "image":
        titles.append(f"images/s per {rate_owner(result)}")
    return [*titles, "note"]


def rate_owner(result: CaseResult) -> str:
    """Returns what a rate of the case is per: 'GPU', or 'CPU process (2 threads)'; the two are never mixed."""
    return "GPU" if result.device == "cuda" else f"CPU process ({threads_text(result)})"


def cells(result: CaseResult, row: Row) -> list[str]:
    """Returns the row as texts, one for each header."""
    cpu = row.ms["cpu"]
    values = [
        f"{row.name} ({row.role})" if row.role else row.name,
        number(cpu.median),
        interval(cpu),
        number(row.ms["wall"].median),
        f"{row.speedup[result.primary].median:.2f}",
        f"{row.over_ceiling[result.primary].median:.2f}",
    ]
    if result.unit == "image":
        values.append(number(1000 / row.ms["wall"].median))
    extra = [_named_figure(name, value) for name, value in row.extra.items()]
    return [*values, "; ".join(filter(None, [row.note, *extra]))]


def _named_figure(name: str, value: float) -> str:
    """Formats an extra figure: '% of peak 12.3', or 'data wait 4.5%' if its name ends in '_share'."""
    is_share = name.endswith("_share") or name == "mfu"
    text = "MFU" if name == "mfu" else name.removesuffix("_share").replace("_", " ") if is_share else name
    return f"{text} {value:.1%}" if is_share else f"{text} {number(value)}"


def circumstances(record: dict[str, Any]) -> list[str]:
    """Returns lines with command, time, commit, machine, load and versions."""
    provenance, load, seconds = record["provenance"], record["load_average"], record.get("case_seconds")
    commit = f"{provenance['commit'] or 'unknown'}{' with uncommitted changes' if provenance['uncommitted_changes'] else ''}"
    return [
        f"`{provenance['command']}`",
        f"{record['started']}, {record['seconds']:.0f} s, {'quick' if record['quick'] else 'full'} settings, commit {commit}",
        f"{provenance['cpu']}, {provenance['cores']} cores, GPU: {provenance['gpu'] or 'none'}; {provenance['system']}",
        *(_clocks(record["machine"]) if "machine" in record else []),
        f"load average at the start {_loads(load['start'])}, at the end {_loads(load['end'])} (1, 5, 15 min; ours included)",
        ", ".join(f"{name} {version}" for name, version in provenance["versions"].items()),
        f"measuring itself costs {1000 * record['measuring_overhead_ms']:.1f} us per sample of several milliseconds",
        # Records before December 2026 do not contain the seconds, those before November not the clocks.
        *([f"seconds by case: {', '.join(f'{name} {value:.0f}' for name, value in seconds.items())}"] if seconds else []),
    ]


def _clocks(machine: dict[str, Any]) -> list[str]:
    governor = machine["cpu_governor"] or "not visible"
    cards = [", ".join(f"{name} {value}" for name, value in card.items()) for card in machine["gpus"]]
    lines = [f"{machine['memory_gib']} GiB memory, CPU at {machine['cpu_mhz']} MHz, governor {governor}", *cards]
    # Records before December 2026 do not say; they are of CPUs that have it.
    if not machine.get("bf16_on_cpu", True):
        lines.append(
            "this CPU has no instructions for bf16: where that is the setting, steps were computed in float32, ours and the rivals'"
        )
    return lines


def interval(value: Estimate) -> str:
    return f"{number(value.low)} .. {number(value.high)}"


def number(value: float) -> str:
    """Formats a number with three significant digits and no exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def threads_text(result: CaseResult) -> str:
    return f"{result.threads} thread{'s' if result.threads > 1 else ''}"


def _loads(values: list[float]) -> str:
    return " ".join(f"{value:.1f}" for value in values)


def log_console() -> Console:
    """Returns a console as wide as the terminal; in a log, which has no width, lines are not wrapped."""
    console = Console()
    return console if console.is_terminal else Console(width=LOG_COLUMNS)


def case_table(result: CaseResult) -> Table:
    """Returns the case as a table for the terminal."""
    table = Table(title=f"{result.case}: {result.title} ({result.rounds} rounds)", title_justify="left")
    for position, title in enumerate(headers(result)):
        table.add_column(title, justify="left" if position in (0, len(headers(result)) - 1) else "right")
    for row in result.rows:
        table.add_row(*cells(result, row))
    return table


def report_markdown(record: dict[str, Any], results: list[CaseResult]) -> str:
    """Returns report.md: where and when it was measured, then each case with its table and docstring."""
    parts = ["# fastbyol benchmarks", "\n".join(f"- {line}" for line in circumstances(record)), HOW_TO_READ]
    parts += [QUICK] if record["quick"] else []
    parts += [_case_markdown(result) for result in results]
    for finding in record.get("findings", {}).values():
        parts += [f"## {finding['title']}", markdown_table(("what", "found"), finding["found"].items(), text_columns=2)]
    if record["skipped"]:
        parts.append("## Skipped\n" + "\n".join(f"- {name}: {why}" for name, why in record["skipped"].items()))
    return "\n\n".join(parts) + "\n"


def _case_markdown(result: CaseResult) -> str:
    parts = [f"## {result.case}: {result.title}", f"{result.rounds} rounds, {threads_text(result)}."]
    parts.append(markdown_table(headers(result), (cells(result, row) for row in result.rows)))
    if result.skipped:
        parts.append("\n".join(f"Skipped: {name}: {why}" for name, why in result.skipped.items()))
    return "\n\n".join([*parts, case_docstring(result.case)])


def markdown_table(titles: Sequence[str], rows: Iterable[Iterable[str]], *, text_columns: int = 1) -> str:
    """Returns a table whose first columns are text, and the others numbers, except notes."""
    alignment = ["---" if place < text_columns or title == "note" else "---:" for place, title in enumerate(titles)]
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in (titles, *rows)]
    lines.insert(1, f"|{'|'.join(alignment)}|")
    return "\n".join(lines)
