"""Formats records as tables: Markdown for report.md and rich for the terminal, from the same cells.

python -m benchmarks.report DIR             rewrites DIR/report.md and DIR/report.html from DIR/records.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.cases import case_docstring
from benchmarks.record import CaseResult
from benchmarks.record_file import read_record, results_of
from benchmarks.report_text import HOW_TO_READ, QUICK, cells, circumstances, headers, threads_text
from fastbyol.config.arguments import OneLineParser
from fastbyol.config.errors import one_line_errors


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a records.json")
    folder = parser.parse_args(arguments).folder
    write_reports(folder, read_record(folder))


def write_reports(out: Path, record: dict[str, Any]) -> None:
    """Writes report.md and report.html for the record."""
    from benchmarks.report_page import report_page  # imports matplotlib, which takes a second

    results = results_of(record)
    (out / "report.md").write_text(report_markdown(record, results))
    (out / "report.html").write_text(report_page(record, results))


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
        lines = [_line([what, found]) for what, found in finding["found"].items()]
        parts.append("\n".join([f"## {finding['title']}", "", _line(["what", "found"]), _line(["---", "---"]), *lines]))
    if record["skipped"]:
        parts.append("## Skipped\n" + "\n".join(f"- {name}: {why}" for name, why in record["skipped"].items()))
    return "\n\n".join(parts) + "\n"


def _case_markdown(result: CaseResult) -> str:
    titles = headers(result)
    lines = [f"## {result.case}: {result.title}", "", f"{result.rounds} rounds, {threads_text(result)}.", "", _line(titles)]
    lines.append(_line(["---"] + ["---:"] * (len(titles) - 2) + ["---"]))
    lines += [_line(cells(result, row)) for row in result.rows]
    if result.skipped:
        lines += ["", *(f"Skipped: {name}: {why}" for name, why in result.skipped.items())]
    return "\n".join([*lines, "", case_docstring(result.case)])


def _line(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"


if __name__ == "__main__":
    main()
