"""Writes the reports of a record: report.md, and report.html with the headline, verdict, plots and tables (no network, no script).

python -m benchmarks.report DIR             rewrites both in DIR from DIR/records.json
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks import breakdown, plots
from benchmarks.cases import case_docstring
from benchmarks.record import CaseResult
from benchmarks.record_file import read_record, results_of
from benchmarks.report_text import HOW_TO_READ, QUICK, cells, circumstances, headers, rate_owner, report_markdown, threads_text
from fastbyol.config.arguments import OneLineParser
from fastbyol.config.errors import one_line_errors
from fastbyol.evaluation.page import cards, command, image, page, paragraph, section, table

NO_GPU = "No GPU in this record: rates are per CPU process, and say nothing about images/s per GPU."
NOT_BROKEN = "\u00a0..\u00a0"  # an interval stays in one line of its cell


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a records.json")
    folder = parser.parse_args(arguments).folder
    write_reports(folder, read_record(folder))


def write_reports(out: Path, record: dict[str, Any]) -> None:
    """Writes report.md and report.html for the record."""
    results = results_of(record)
    (out / "report.md").write_text(report_markdown(record, results))
    (out / "report.html").write_text(report_page(record, results))


def report_page(record: dict[str, Any], results: list[CaseResult]) -> str:
    """Returns the whole page as HTML."""
    started, quick = record["started"][:10], "quick" if record["quick"] else "full"
    lead = f"{record['provenance']['gpu'] or record['provenance']['cpu']}, {started}, {quick} settings"
    sections = [_summary(record, results), *(_case(result) for result in results), _checks(record), _skipped(record), _record(record)]
    return page("fastbyol benchmarks", lead=lead, sections=[text for text in sections if text])


def _summary(record: dict[str, Any], results: list[CaseResult]) -> str:
    owners = {result.case: rate_owner(result) for result in results}
    found = breakdown.headlines(results, owner_of=owners)
    parts = [cards((headline.value, headline.meaning) for headline in found)]
    if not record["provenance"]["gpu"]:
        parts.append(paragraph(NO_GPU, kind="note"))
    if record["quick"]:
        parts.append(paragraph(QUICK, kind="note"))
    parts += ["<h3>Data-bound?</h3>", *(paragraph(sentence) for sentence in breakdown.verdict(results))]
    return section("summary", title="How fast, and what is the limit", parts=parts)


def _case(result: CaseResult) -> str:
    titles = headers(result)
    rows = [[cell.replace(" .. ", NOT_BROKEN) for cell in cells(result, row)] for row in result.rows]
    numbers = frozenset(range(1, len(titles) - 1))
    parts = [*_plots(result), table(titles, rows=rows, numbers=numbers)]
    parts += [paragraph(f"Skipped: {name}: {why}", kind="note") for name, why in result.skipped.items()]
    parts += [
        paragraph(f"{result.rounds} rounds, {threads_text(result)}, intervals of {result.coverage:.0%}.", kind="note"),
        _about(result),
    ]
    return section(result.case, title=f"{result.case}: {result.title}", parts=parts)


def _about(result: CaseResult) -> str:
    """Returns the case's docstring as HTML; its paragraphs are prose, except the command."""
    blocks = case_docstring(result.case).split("\n\n")
    return "".join(command(block.strip()) if block.startswith("    ") else f'<p class="note">{_prose(block)}</p>' for block in blocks)


def _prose(block: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(" ".join(block.split())))


def _plots(result: CaseResult) -> Iterator[str]:
    clock = "CPU" if result.primary == "cpu" else "wall"
    ceiling = next((row for row in result.rows if row.role == "ceiling"), None)
    if steps := breakdown.waterfall(result):
        limit = ceiling.ms[result.primary] if ceiling else None
        yield from _figure("From naive to ours", plots.waterfall(steps, unit=result.unit, clock=clock, ceiling=limit))
    if result.case == "loader" and (shares := breakdown.loader_shares(result)):
        yield from _figure("Where the time of an image goes", plots.stacked(shares, axis="CPU-ms / image"))
    if shares := breakdown.time_shares(result):
        yield from _figure("Where the time goes", plots.stacked(shares, axis=f"wall-ms / {result.unit}"))
    if found := breakdown.roofline(result):
        yield from _figure("Roofline", plots.roofline(found))
    if len(points := breakdown.scaling_points(result)) > 1:
        yield from _figure("Scaling", plots.scaling(points, owner="GPU" if result.device == "cuda" else "CPU process"))
    yield from _figure("How far from the ceiling", plots.over_ceiling(result))


def _figure(title: str, png: bytes) -> Iterator[str]:
    yield f"<h3>{escape(title)}</h3>"
    yield image(png, alt=title, kind="figure")


def _checks(record: dict[str, Any]) -> str:
    """Returns findings that are not times, from the GPU plan."""
    parts: list[str] = []
    for values in record.get("findings", {}).values():
        parts += [f"<h3>{escape(values['title'])}</h3>", table(("what", "found"), rows=list(values["found"].items()))]
    return section("findings", title="Findings", parts=parts) if parts else ""


def _skipped(record: dict[str, Any]) -> str:
    if not record["skipped"]:
        return ""
    return section("skipped", title="Skipped", parts=[table(("case", "why"), rows=list(record["skipped"].items()))])


def _record(record: dict[str, Any]) -> str:
    lines = [paragraph(line.strip("`") if line.startswith("`") else line, kind="note") for line in circumstances(record)]
    return section("record", title="Where, when, how", parts=[*lines, paragraph(HOW_TO_READ, kind="note")])


if __name__ == "__main__":
    main()
